"""A pytest plugin: `sshd`, a real SSH server of the tests' own on the loopback interface.

Logins are of the user that runs the tests, with a home directory of its own.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import servers
from diracx.tasks.testing.server import free_port
from support.server_processes import paused, wait_until_it_responds

_SECONDS = 30
_CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {directory}/host_key
PidFile {directory}/sshd.pid
AuthorizedKeysFile {directory}/authorized_keys
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PermitRootLogin prohibit-password
PermitUserEnvironment yes
MaxStartups 100:30:200
MaxSessions 10
PrintMotd no
PrintLastLog no
Banner {directory}/banner
"""


class Sshd:
    """A private server, which can be stopped, cut off, frozen and given another identity."""

    def __init__(self, program: str, directory: Path, login_shell: str | None = None) -> None:
        self._program = program
        self._before: list[str] = []
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        self.user = pwd.getpwuid(os.geteuid()).pw_name
        self.home = directory / "home"
        """Home and working directory of commands."""
        self.client_key = directory / "client_key"
        self.known_hosts = directory / "known_hosts"
        """Holds the host key that the server had at first."""
        self.banner = directory / "banner"
        """Printed to clients before they log in."""
        self.home.mkdir()
        self.make_key(self.client_key)
        self.make_key(directory / "host_key")
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {self.host_key()}\n")
        public = self.client_key.with_suffix(".pub").read_text()
        if login_shell is not None:
            self._give(login_shell)
        # A home without profiles, which may be slow.
        (directory / "authorized_keys").write_text(f'environment="HOME={self.home}" {public}')
        self.banner.touch()
        (directory / "config").write_text(_CONFIG.format(port=self.port, directory=directory))

    def _give(self, login_shell: str) -> None:
        """Give the user another login shell, for this server alone: it sees another /etc/passwd."""
        entries = [line.split(":") for line in Path("/etc/passwd").read_text().splitlines()]
        for entry in entries:
            if entry[0] == self.user:
                entry[-1] = login_shell
        (self._directory / "passwd").write_text("".join(":".join(entry) + "\n" for entry in entries))
        mount = f'mount --bind {self._directory}/passwd /etc/passwd && exec "$@"'
        self._before = ["unshare", "--mount", "/bin/sh", "-c", mount, "sh"]

    @property
    def settings(self) -> dict[str, Any]:
        """For a compute element on this host."""
        return {
            "host": "127.0.0.1",
            "port": self.port,
            "username": self.user,
            "known_hosts": str(self.known_hosts),
            "client_keys": [str(self.client_key)],
            "connect_timeout_seconds": 10,
        }

    def make_key(self, path: Path, passphrase: str = "", kind: str = "ed25519") -> Path:
        """A new key pair."""
        path.unlink(missing_ok=True)
        command = ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", "test", "-f", str(path)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        return path

    def host_key(self) -> str:
        """The public part of its present host key: kind and key."""
        return " ".join((self._directory / "host_key.pub").read_text().split()[:2])

    def start(self) -> None:
        """Start it, if it does not run; return when it responds."""
        if self._process is not None:
            return
        command = [*self._before, self._program, "-D", "-e", "-f", str(self._directory / "config")]
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_until_it_responds(self._process, self._responds, self._directory / "log", _SECONDS)

    def stop(self) -> None:
        """Stop the server and all connections; processes started through them continue."""
        process, self._process = self._process, None
        if process is not None:
            connections = _children(process.pid)
            process.kill()
            process.wait(_SECONDS)
            self._kill(connections)

    def cut(self) -> None:
        """End all connections; new ones are welcome."""
        assert self._process is not None
        self._kill(_children(self._process.pid))

    def logins(self) -> int:
        """Count the logins."""
        return (self._directory / "log").read_text(errors="replace").count("Accepted publickey")

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """Inside the block it does not run."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def frozen(self) -> contextlib.AbstractContextManager[None]:
        """Context in which it accepts connections and does not respond."""
        assert self._process is not None
        return paused(self._process.pid, *_children(self._process.pid))

    @contextlib.contextmanager
    def another_host_key(self, kind: str = "ed25519") -> Iterator[None]:
        """Context in which it has the identity of another host."""
        kept = {suffix: (self._directory / f"host_key{suffix}").read_bytes() for suffix in ("", ".pub")}
        self.make_key(self._directory / "host_key", kind=kind)
        try:
            with self._restarted():
                yield
        finally:
            for suffix, content in kept.items():
                (self._directory / f"host_key{suffix}").write_bytes(content)
            with self._restarted():
                pass

    @contextlib.contextmanager
    def _restarted(self) -> Iterator[None]:
        with self.down():
            pass
        yield

    def _kill(self, connections: list[int]) -> None:
        for pid in connections:
            # Its unprivileged half first, if it has one.
            for each in (*(half for half in _children(pid) if _is_sshd(half)), pid):
                _signal(each, signal.SIGKILL)

    def _responds(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 5) as probe:
            return probe.recv(4) == b"SSH-"
        return False


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _children(pid: int) -> list[int]:
    try:
        tasks = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [int(child) for child in tasks]


def _is_sshd(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().startswith("sshd")
    return False


def _program() -> str:
    pytest.importorskip("asyncssh")
    program = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if program is None or shutil.which("ssh-keygen") is None:
        pytest.skip("OpenSSH is not installed: there is no program sshd, or no ssh-keygen")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # it insists on it
    return program


@pytest.fixture(scope="session")
def _sshd() -> Iterator[Sshd]:
    yield from _running()


@pytest.fixture(scope="session")
def _csh_sshd() -> Iterator[Sshd]:
    if (obstacle := servers.obstacle("tcsh")) is not None:
        pytest.skip(obstacle)
    if os.geteuid() != 0:
        pytest.skip("another login shell can be given by root only")
    yield from _running(shutil.which("tcsh"))


def _running(login_shell: str | None = None) -> Iterator[Sshd]:
    program = _program()
    with tempfile.TemporaryDirectory(prefix="gubbins-sshd-") as directory:
        server = Sshd(program, Path(directory), login_shell)
        server.start()
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture
def sshd(_sshd: Sshd) -> Iterator[Sshd]:
    """A server that runs, and does again after each test."""
    _sshd.start()
    yield _sshd
    _sshd.start()


@pytest.fixture(scope="session")
def jump_sshd() -> Iterator[Sshd]:
    """A second server, to go through."""
    yield from _running()


@pytest.fixture
def csh_sshd(_csh_sshd: Sshd) -> Iterator[Sshd]:
    """A server whose user has tcsh as login shell, which prints and sets options of commands at each log-in."""
    options = {"SQUEUE_NAMES": "x", "SQUEUE_SORT": "x", "SCANCEL_STATE": "PENDING", "SBATCH_ARRAY_INX": "1-3"}
    options["BSUB_QUIET"] = "y"
    settings = "".join(f"setenv {name} {value}\n" for name, value in options.items())
    _csh_sshd.home.joinpath(".cshrc").write_text(f"echo Welcome\necho 42\n{settings}")
    _csh_sshd.start()
    yield _csh_sshd
    _csh_sshd.start()
