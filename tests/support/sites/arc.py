"""A pytest plugin: an ARC CE of the tests' own, A-REX with its REST interface and a test CA.

`arc_site` runs for a file of tests; a test that stops it must start it again, or uses `arc_site.down()`. What is
not installed is skipped, with a line that says what is missing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
from diracx.tasks.testing.server import free_port

from ..pilot_waiters import alive
from ..server_processes import paused
from ..waiting import eventually
from .token_issuer import TokenIssuer

_SECONDS = 110  # it takes five, unless the machine is busy
_START_SECONDS = 20  # after which one that has not written its process id is started again
_PARTS = {"arex.pid": "arc-arex-start", "ws.pid": "arc-arex-ws-start"}
_SHARE = Path("/usr/share/arc")
_HOST_CAS = "/etc/grid-security/certificates"
_PARSER = Path("/usr/lib/arc/arcconfig-parser")
# How long a state of the batch system may be old: the default of 60 s would be waited for by tests. A-REX takes
# tenths of a second. Each time costs half a second of processor time.
_INFORMATION_TENTHS = 100
# A-REX and its scripts ask for settings that do not change, each time from a new Python: each response is kept.
_PARSER_THAT_REMEMBERS = """\
#!/bin/sh
case " $* " in *" --load "*) ;; *) exec {parser} "$@" ;; esac
name() {{ IFS=/; set -f; set -- $*; IFS=,; response={responses}/$*; }}
name "$@"
if [ ! -r "$response" ]; then
    {parser} "$@" > "$response.$$" && mv "$response.$$" "$response" || exec {parser} "$@"
fi
exec cat "$response"
"""
# While a program of A-REX runs and has closed one of its pipes, A-REX asks thousands of times a second whether it
# has ended. So a submission takes no second, the search for ended jobs pauses after its end, a job that ignores
# SIGTERM is killed in the background, and the provider of information keeps its pipe.
_PAUSE = """\
cd {directory} && mkdir pause || exit 0
(sleep 10; rmdir pause) &
"""

_CONFIGURATION = """\
[common]
hostname=localhost
x509_host_key={directory}/host.key
x509_host_cert={directory}/host.pem
x509_cert_dir={directory}/ca
[authgroup:subjects]
file={directory}/allowed-subjects
[authgroup:tokens]
authtokens=* {issuer} * * *
authtokens=* {provider} {audience} * *
[authtokens]
[mapping]
map_to_user=subjects nobody:nogroup
map_to_user=tokens nobody:nogroup
policy_on_nomap=stop
[lrms]
lrms=fork
[arex]
controldir={directory}/control
sessiondir={directory}/session
logfile={directory}/log/arex.log
joblog={directory}/log/jobs.log
pidfile={directory}/run/arex.pid
loglevel=INFO
wakeupperiod=1
delegationdb=sqlite
user=root
tmpdir={directory}/tmp
[arex/jura]
logfile={directory}/log/jura.log
[arex/ws]
wsurl={url}
logfile={directory}/log/ws.log
pidfile={directory}/run/ws.pid
[arex/ws/jobs]
allowaccess=subjects
allowaccess=tokens
[infosys]
logfile={directory}/log/infosys.log
[infosys/glue2]
[infosys/cluster]
[queue:fork]
"""


class ArcSite:
    """A-REX in a directory: `url`, `ca` (a directory and a file), and credentials of a known user.

    It trusts tokens of `issuer`, if `knows_tokens`, and fetches its keys from there when it is shown one.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.url = f"https://localhost:{self.port}/arex"
        self.provider_port = free_port()
        """Port of an identity provider whose tokens for `url` are accepted, below /api/oidc."""
        self.issuer = TokenIssuer(free_port(), directory / "host.pem", directory / "host.key")
        self.ca_directory = directory / "ca"
        self._hold = directory / "hold"
        self._environment = {**os.environ, "ARC_CONFIG": str(directory / "arc.conf")}
        for name in ("ca", "control", "run", "log"):
            (directory / name).mkdir()
        for name in ("session", "tmp"):
            (directory / name).mkdir()
            (directory / name).chmod(0o1777)
        self._make_certificates()
        provider = f"https://localhost:{self.provider_port}/api/oidc"
        issuers = {"issuer": self.issuer.url, "provider": provider, "audience": self.url}
        configuration = _CONFIGURATION.format(directory=directory, url=self.url, **issuers)
        (directory / "arc.conf").write_text(configuration)
        # Made by the start script otherwise, with a minute of CPU.
        parameters = directory / "control/dhparam.pem"
        self._run("openssl", "genpkey", "-genparam", "-algorithm", "DH", "-pkeyopt", "group:ffdhe2048",
                  "-out", str(parameters))  # fmt: skip
        parameters.chmod(0o600)
        listen, config = "<tcp:Listen>", "</arex:gmconfig>"
        self._changed("arc-arex-ws-start", (listen, f"{listen}<tcp:Interface>127.0.0.1</tcp:Interface>"))
        period = f"<arex:InfoproviderWakeupPeriod>{_INFORMATION_TENTHS}</arex:InfoproviderWakeupPeriod>"
        self._changed("arc-arex-start", (config, config + period))

        # For the CA of a token's issuer it looks at one place of the host, which is to stay as it is. Where
        # such a place can be put in front of it for its processes alone, it gets to know the test CA there.
        mount = f"mount --bind {self.ca_directory} {_HOST_CAS} && "
        mount += f"mount --bind {self._parser_that_remembers()} {_PARSER} && "
        for copy in self._changed_programs():
            mount += f"mount --bind {copy} {_SHARE / copy.name} && "
        mount += 'ulimit -n 1024 && exec "$@"'  # A-REX closes as many files before each program that it starts
        private = ["unshare", "--mount", "/bin/sh", "-c", mount, "sh"]
        tried = subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True)
        self.knows_tokens = tried.returncode == 0
        self._namespace = private if self.knows_tokens else []

    def _make_certificates(self) -> None:
        self._run("arcctl", "test-ca", "--ca-id", "CI", "--ca-dir", str(self.ca_directory), "init")
        self._test_ca("hostcert", "-n", "localhost", "-f")
        for kind, name in (("cert", "host.pem"), ("key", "host.key")):
            (self.directory / f"host-localhost-{kind}.pem").rename(self.directory / name)
        (self.directory / "host.key").chmod(0o600)
        self.certificate, self.key = self.make_user("pilot")
        self.stranger = self.make_user("stranger")
        """A user with a certificate of the same CA who is not authorized."""
        subject = self._run("openssl", "x509", "-in", str(self.certificate), "-noout", "-subject",
                            "-nameopt", "compat")  # fmt: skip
        (self.directory / "allowed-subjects").write_text(f'"{subject.strip().removeprefix("subject=").strip()}"\n')
        self.ca_file = next(self.ca_directory.glob("*[!y].pem"))

    def make_user(self, name: str) -> tuple[Path, Path]:
        """A new certificate and its key."""
        self._test_ca("usercert", "-n", name, "--no-auth", "-f")
        return self.directory / f"client-{name}-cert.pem", self.directory / f"client-{name}-key.pem"

    def make_proxy(self, path: Path, *, begin: str = "now", seconds: int = 3600) -> None:
        """A proxy of the known user, in one file with its key and chain.

        Args:
            path: the file, replaced when it exists.
            begin: "now", or a time as YYYYMMDDHHMMSSZ.
            seconds: how long it is valid from then on.
        """
        new = path.with_suffix(".new")
        # fmt: off
        self._run(
            "arcproxy", "--cert", str(self.certificate), "--key", str(self.key), "--proxy", str(new),
            "--cadir", str(self.ca_directory), "--constraint", f"validityPeriod={seconds}",
            *(() if begin == "now" else ("--constraint", f"validityStart={begin}")),
        )
        # fmt: on
        new.replace(path)

    def _test_ca(self, *arguments: str) -> None:
        self._run("arcctl", "test-ca", "--ca-id", "CI", "--ca-dir", str(self.ca_directory), *arguments)

    def _changed_programs(self) -> list[Path]:
        """Copy programs of A-REX that are to be changed."""
        running, held = "{status} = 'R'", f"{{status}} = -e '{self._hold}' ? 'S' : 'R'"
        begin, opened, kill = "id=`id -u`\n", 'open STDERR, ">>"', "kill -KILL $joboption_jobid"
        pause = _PAUSE.format(directory=self.directory)
        return [
            # The module for processes as jobs can call them suspended, as batch systems do.
            self._changed("FORKmod.pm", (running, held)),
            self._changed("scan-fork-job", (begin, pause + begin), ("\nsleep 10\n", "\n")),
            self._changed("submit-fork-job", ("    sleep 1\n", "    sleep 0.1\n")),
            self._changed("cancel-fork-job", (f"sleep 5\n        {kill}\n", f"(sleep 5; {kill}) &\n")),
            self._changed("CEinfo.pl", (opened, f'open our $kept, ">&", *STDERR; {opened}')),
        ]

    def _parser_that_remembers(self) -> Path:
        """Copy the program that reads the configuration, behind a script that keeps its responses."""
        program, script, responses = (
            self.directory / name for name in ("parser", "remembering-parser", "responses")
        )
        shutil.copy(_PARSER, program)
        responses.mkdir()
        responses.chmod(0o1777)  # jobs are submitted by their user
        script.write_text(_PARSER_THAT_REMEMBERS.format(parser=program, responses=responses))
        script.chmod(0o755)
        return script

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Inside the block the batch system calls its jobs suspended, and A-REX calls them HELD."""
        self._hold.touch()
        try:
            yield
        finally:
            self._hold.unlink()

    def _changed(self, name: str, *replacements: tuple[str, str]) -> Path:
        """Copy a program of A-REX, with other texts."""
        text, copy = (_SHARE / name).read_text(), self.directory / name
        for old, new in replacements:
            assert old in text, f"{name} is not what it was"
            text = text.replace(old, new)
        copy.write_text(text)
        copy.chmod(0o755)
        return copy

    def _run(self, *command: str) -> str:
        done = subprocess.run(
            command, check=False, cwd=self.directory, env=self._environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def start(self) -> None:
        """Start missing processes, again if one dies at its start; return when all respond."""
        deadline = time.monotonic() + _SECONDS
        started = dict.fromkeys(_PARTS, float("-inf"))
        while True:
            dead = [pid_file for pid_file in _PARTS if self._pid(pid_file) is None]
            if not dead and self._responds():
                return
            assert time.monotonic() < deadline, f"A-REX does not respond:\n{self._last_words()}"
            for pid_file in dead:
                if time.monotonic() - started[pid_file] > _START_SECONDS:  # else it may not have come to its file
                    started[pid_file] = time.monotonic()
                    self._launch(_PARTS[pid_file])
            time.sleep(0.05)

    def _launch(self, script: str) -> None:
        with (self.directory / "log" / f"{script}.out").open("ab") as log:
            subprocess.run(
                [*self._namespace, "/bin/bash", self.directory / script],
                check=False,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                timeout=_SECONDS,
            )

    def stop(self) -> None:
        """End all of it, and its jobs."""
        self._kill("ws.pid")
        self._kill("arex.pid")
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (process / "cwd").readlink().is_relative_to(self.directory):
                    os.kill(int(process.name), signal.SIGKILL)

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """Context in which its port is closed; the processes of jobs continue."""
        self._kill("ws.pid")
        try:
            yield
        finally:
            self.start()

    def frozen(self) -> contextlib.AbstractContextManager[None]:
        """Context in which it accepts connections and does not respond."""
        pid = self._pid("ws.pid")
        assert pid is not None
        return paused(pid)

    def _kill(self, pid_file: str) -> None:
        """As a power cut would: an orderly end takes it up to ten seconds."""
        if (pid := self._pid(pid_file)) is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: not alive(pid), f"{pid} ends", _SECONDS)
        (self.directory / "run" / pid_file).unlink(missing_ok=True)

    def _pid(self, pid_file: str) -> int | None:
        try:
            pid = int((self.directory / "run" / pid_file).read_text())
        except (FileNotFoundError, ValueError):
            return None
        return pid if alive(pid) else None

    def _responds(self) -> bool:
        context = ssl.create_default_context(cafile=str(self.ca_file))
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # the test CA is not strict, and Python 3.13 would be
        context.load_cert_chain(self.certificate, self.key)
        try:
            with (
                socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection,
                context.wrap_socket(connection, server_hostname="localhost") as channel,
            ):
                channel.sendall(
                    b"GET /arex/rest/1.0/jobs HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                )
                return b" 200 " in channel.recv(1000)
        except OSError:
            return False

    def _last_words(self) -> str:
        # Beside the logs lies a directory in which the daemons leave what is left of them when they crash.
        logs = sorted(path for path in (self.directory / "log").rglob("*") if path.suffix in (".log", ".out"))
        return "\n".join(f"{path.name}:\n{path.read_text(errors='replace')[-1500:]}" for path in logs)


@pytest.fixture(scope="module")
def arc_site() -> Iterator[ArcSite]:
    """An ARC CE that runs jobs as processes of this host."""
    if (obstacle := servers.obstacle("ARC")) is not None:
        pytest.skip(obstacle)
    if os.geteuid() != 0:
        pytest.skip("an ARC CE runs jobs for others: it must be started by root")
    # Not below pytest's own directory, which is closed to the user of the jobs.
    with tempfile.TemporaryDirectory(prefix="diracx-arc-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        directory.chmod(0o755)
        site = ArcSite(directory)
        try:
            site.start()
            with site.issuer.running():
                yield site
        finally:
            site.stop()
