"""A pytest plugin: `gridengine_site`, a Grid Engine of the tests' own, with one node.

It listens on all interfaces, so it has a network of its own, in which there is the loopback interface alone:
commands enter that. It ends with the first process there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import servers
from support.machine import not_for_this_machine
from support.server_processes import paused

from gubbins.ces.transports.shell import Completed, LocalShell

_SECONDS = 60
_SHARED = Path("/var/lib/gridengine")
_DEFAULTS = Path("/usr/share/gridengine")
# The programs themselves: in /usr/bin are scripts that run `arch` twice before, which runs ten other programs.
_PROGRAMS = Path("/usr/lib/gridengine")
_START = """\
set -e
ip link set lo up
hostname localhost
sge_qmaster
exec sleep infinity
"""
_QUEUE = {
    "qname": "pilots", "hostlist": "localhost", "seq_no": "0", "nsuspend": "1", "suspend_interval": "00:05:00",
    "priority": "0", "min_cpu_interval": "00:05:00", "processors": "UNDEFINED", "qtype": "BATCH", "rerun": "FALSE",
    "slots": "60", "tmpdir": "/tmp", "shell": "/bin/sh", "shell_start_mode": "unix_behavior", "notify": "00:00:60",
    "initial_state": "default",
}  # fmt: skip
_NONE = [
    *("load_thresholds", "suspend_thresholds", "ckpt_list", "pe_list", "prolog", "epilog", "starter_method"),
    *("suspend_method", "resume_method", "terminate_method", "owner_list", "user_lists", "xuser_lists"),
    *("subordinate_list", "complex_values", "projects", "xprojects", "calendar"),
]
# Defaults of the site for commands, which the back end has to override.
_OPTIONS = {"sge_qstat": "-s p -u nobody\n", "sge_request": "-b y\n"}
_LIMITS = ("rt", "cpu", "fsize", "data", "stack", "core", "rss", "vmem")


class GridEngineSite(LocalShell):
    """A qmaster and an execd in a directory; commands that are run here see them."""

    def __init__(self, directory: Path) -> None:
        self._cell = directory / "default" / "common"
        self._spool = directory / "spool"
        self._directory = directory
        self.environment = {"SGE_ROOT": str(directory), "SGE_CELL": "default", "SGE_QMASTER_PORT": "6444"}
        self.environment |= {"SGE_EXECD_PORT": "6445", "PATH": f"{_PROGRAMS}:{os.environ['PATH']}:/usr/sbin"}
        super().__init__(self.environment)
        self._process: subprocess.Popen[bytes] | None = None

    async def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float) -> Completed:
        """Run a command on the submit host."""
        return await super().run([*self._enter(), *argv], stdin=stdin, timeout=timeout)

    def start(self) -> None:
        """Start it; return when it has a node and a queue."""
        for path in (self._cell, *(self._spool / name for name in ("qmaster/job_scripts", "db", "exec"))):
            path.mkdir(parents=True)
        for name in ("bin", "lib", "util", "utilbin"):
            (self._directory / name).symlink_to(_SHARED / name)
        own = {
            "admin_user": "none",
            "spooling_params": self._spool / "db",
            "qmaster_spool_dir": self._spool / "qmaster",
        }
        self._change((_DEFAULTS / "default-bootstrap").read_text(), self._cell / "bootstrap", own)
        for name, text in ({"act_qmaster": "localhost\n"} | _OPTIONS).items():
            (self._cell / name).write_text(text)
        init = [_DEFAULTS / "scripts" / "init_cluster", self._directory, "default", self._spool / "db", "root"]
        subprocess.run(init, env=self.environment, check=True, capture_output=True, timeout=_SECONDS)
        with (self._directory / "log").open("wb") as log:
            space = ["unshare", "--net", "--uts", "--pid", "--fork", "--kill-child"]
            self._process = subprocess.Popen(
                [*space, "/bin/sh", "-c", _START],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._until(lambda: self._qconf("-sconf") != "")
        self._qconf("-as", "localhost")
        own = {"execd_spool_dir": self._spool / "exec", "min_uid": "0", "min_gid": "0", "gid_range": "20000-20400"}
        own |= {"shepherd_cmd": str(_PROGRAMS / "sge_shepherd")}
        self.configure(**own, mailer="/bin/true", load_report_time="00:00:01")
        own = {"schedule_interval": "0:0:1", "flush_submit_sec": "1", "flush_finish_sec": "1"}
        self._change(self._qconf("-ssconf"), self._directory / "scheduler", own)
        self._qconf("-Msconf", str(self._directory / "scheduler"))
        queue = _QUEUE | dict.fromkeys(_NONE, "NONE")
        queue |= {f"{kind}_{name}": "INFINITY" for kind in "sh" for name in _LIMITS}
        self._change("\n".join(queue), self._directory / "queue", queue)
        self._qconf("-Aq", str(self._directory / "queue"))
        self.command("sge_execd")
        self._until(lambda: " lx-" in self.command("qhost"))

    def stop(self) -> None:
        """End all of it, and its jobs."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(_SECONDS)

    def configure(self, **values: object) -> None:
        """Change the global configuration."""
        path = self._directory / "global"
        self._change(self._qconf("-sconf"), path, values)
        self._qconf("-Mconf", str(path))

    def command(self, *argv: str) -> str:
        """Run a command as an operator of the site; its output, whatever its exit code."""
        done = subprocess.run(
            [*self._enter(), *argv],
            env=self.environment,
            cwd=self._directory,
            capture_output=True,
            text=True,
            check=False,
            timeout=_SECONDS,
        )
        return done.stdout

    def frozen(self) -> contextlib.AbstractContextManager[None]:
        """Stop the qmaster from responding inside this context."""
        return paused(self._qmaster())

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """Without the qmaster inside this context."""
        os.kill(self._qmaster(), signal.SIGKILL)
        try:
            yield
        finally:
            self.command("sge_qmaster")
            self._until(lambda: " lx-" in self.command("qhost"))

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Inside this context all new jobs are put on hold by the site's request file."""
        requests = self._cell / "sge_request"
        requests.write_text(f"{_OPTIONS[requests.name]}-h\n")
        try:
            yield
        finally:
            requests.write_text(_OPTIONS[requests.name])
            self.command("qrls", "*")

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Inside this context each user may have one job."""
        self.configure(max_u_jobs="1")
        try:
            yield
        finally:
            self.configure(max_u_jobs="0")

    def _qmaster(self) -> int:
        return self._pid_of("sge_qmaster")

    def _pid_of(self, name: str) -> int:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                if (process / "comm").read_text().strip() == name and self._is_inside(process):
                    found.append(int(process.name))
        (pid,) = found
        return pid

    def _is_inside(self, process: Path) -> bool:
        try:
            own = os.readlink(process / "ns" / "net")
            return (
                own == os.readlink(f"/proc/{self._first()}/ns/net") and " Z " not in (process / "stat").read_text()
            )
        except OSError:
            return False

    def _first(self) -> int:
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(children[0])

    def _enter(self) -> list[str]:
        return ["nsenter", f"--target={self._first()}", "--net", "--uts", "--pid"]

    def _qconf(self, *arguments: str) -> str:
        return self.command("qconf", *arguments)

    def _change(self, text: str, path: Path, values: Mapping[str, object]) -> None:
        lines = text.replace("\\\n", " ").splitlines()
        changed = [
            f"{name} {values.get(name, value)}" for name, _, value in (line.partition(" ") for line in lines)
        ]
        path.write_text("\n".join(line for line in changed if not line.startswith("#") and line.strip()) + "\n")

    def _until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _SECONDS
        while True:
            with contextlib.suppress(OSError, IndexError):
                if condition():
                    return
            assert time.monotonic() < deadline, (self._directory / "log").read_text()
            time.sleep(0.1)


@pytest.fixture(scope="session")
def gridengine_site() -> Iterator[GridEngineSite]:
    """Grid Engine."""
    if (obstacle := servers.obstacle("Grid Engine")) is not None:
        pytest.skip(obstacle)
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        not_for_this_machine("Grid Engine gets a network of its own, which takes root")
    with tempfile.TemporaryDirectory(prefix="gubbins-sge-") as name:
        site = GridEngineSite(Path(name))
        try:
            site.start()
            yield site
        finally:
            site.stop()
