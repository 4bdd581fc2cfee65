"""A private Slurm: controller, one node and munge in a directory, on the loopback interface."""

from __future__ import annotations

__all__ = ["SlurmSite", "SlurmSiteError"]

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diracx.tasks.testing.server import free_port

_PR_SET_PDEATHSIG = 1
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "sinfo")
_START_SECONDS = 90.0  # on a machine that is busy with other things
_COMMAND_SECONDS = 30.0
_STOP_SECONDS = 10.0
_CONFIGURATION = """\
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={directory}/completed.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=2
SlurmdParameters=config_overrides
MailProg=/bin/true
MpiDefault=none
ReturnToService=2
MinJobAge={min_job_age}
KillWait=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=64000 State=UNKNOWN
PartitionName=short Nodes={host} Default=YES MaxTime=00:10:00 State=UP
PartitionName=long Nodes={host} MaxTime=01:00:00 State=UP
"""


def _end_with_parent() -> None:
    """Have Linux end the process with the demo, even if that was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class SlurmSiteError(RuntimeError):
    """A Slurm site cannot be started here, with the reason."""


class SlurmSite:
    """A controller and a node with the partitions `short` (the default) and `long`.

    Args:
        directory: where all of it is; made here.
        cpus: how many the node pretends to have: as many pilots run at a time.
        min_job_age: for how many seconds Slurm knows a job after its end.
    """

    def __init__(self, directory: Path, *, cpus: int, min_job_age: int = 300) -> None:
        self.directory = directory
        self.node = socket.gethostname().partition(".")[0]
        self.cpus = cpus
        self._min_job_age = min_job_age
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def slurm_conf(self) -> Path:
        return self.directory / "slurm.conf"

    @property
    def completion_log(self) -> Path:
        """The file of `jobcomp/filetxt`."""
        return self.directory / "completed.log"

    @staticmethod
    def obstacle() -> str | None:
        """The reason why no such site can be started here, or None."""
        path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
        missing = [program for program in _PROGRAMS if shutil.which(program, path=path) is None]
        if missing:
            return f"Slurm is not installed: there is no program {', '.join(missing)} (`make servers` installs it)"
        if os.geteuid() != 0:
            return "a Slurm site can be started by root only, for its node starts jobs as their users"
        return None

    def start(self) -> None:
        """Start it and return when it takes jobs.

        Raises:
            SlurmSiteError: it cannot be started here.
        """
        if (obstacle := self.obstacle()) is not None:
            raise SlurmSiteError(obstacle)
        for name in ("state", "spool"):
            (self.directory / name).mkdir(parents=True)
        key = self.directory / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        self.slurm_conf.write_text(self._configuration())
        files = {name: f"--{name}-file={self.directory}/munged.{name}" for name in ("pid", "log", "seed")}
        socket_option = f"--socket={self.directory}/munge.socket"
        # Forced: the directory may be closed to others, who are not to speak to this site.
        self._run("munged", "--foreground", "--force", f"--key-file={key}", socket_option, *files.values())
        self._wait("munged", (self.directory / "munge.socket").exists)
        self.start_controller()
        self._run("slurmd", "-D")
        self._wait("slurmd", lambda: self.command("sinfo", "-h", "-o", "%T", "-p", "short").strip() == "idle")

    def start_controller(self) -> None:
        """Start the controller with its saved state; return when it responds."""
        self._run("slurmctld", "-D", "-i")
        self._wait("slurmctld", lambda: "is UP" in self.command("scontrol", "ping"))

    def kill_controller(self) -> None:
        """End the controller as a power cut would."""
        self._end("slurmctld", signal.SIGKILL)

    @contextlib.contextmanager
    def without_controller(self) -> Iterator[None]:
        """Stop the controller inside this context. It ends in good order: a killed one may lose new jobs."""
        self._end("slurmctld", signal.SIGTERM)
        try:
            yield
        finally:
            self.start_controller()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Context in which the controller accepts connections, and does not respond."""
        self._processes["slurmctld"].send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._processes["slurmctld"].send_signal(signal.SIGCONT)

    def command(self, *argv: str) -> str:
        """The output of a command of Slurm, whether or not it succeeds."""
        try:
            done = subprocess.run(
                argv,
                env=self._environment(),
                capture_output=True,
                text=True,
                check=False,
                timeout=_COMMAND_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return ""
        return done.stdout

    def check(self) -> None:
        """Raise when one of its processes has died.

        Raises:
            SlurmSiteError: with the last line of its log.
        """
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise SlurmSiteError(f"{name} ended with {process.returncode}: {self._last_line(name)}")

    def stop(self) -> None:
        """End all jobs, then everything else."""
        if "slurmd" in self._processes and self._processes["slurmctld"].poll() is None:
            self.command("scancel", "--me")
            deadline = time.monotonic() + _STOP_SECONDS
            while self.command("squeue", "-h", "--me") and time.monotonic() < deadline:
                time.sleep(0.1)
        for name in list(reversed(self._processes)):
            self._end(name, signal.SIGTERM)
        self._end_leftovers()

    def _configuration(self) -> str:
        return _CONFIGURATION.format(
            host=self.node,
            directory=self.directory,
            controller_port=free_port(),
            node_port=free_port(),
            cpus=self.cpus,
            min_job_age=self._min_job_age,
        )

    def _run(self, program: str, *arguments: str) -> None:
        environment = self._environment()
        executable = shutil.which(program, path=environment["PATH"])
        if executable is None:
            raise SlurmSiteError(f"there is no program {program}")
        with (self.directory / f"{program}.log").open("ab") as log:
            self._processes[program] = subprocess.Popen(
                [executable, *arguments],
                cwd=self.directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_end_with_parent,  # noqa: PLW1509  # the caller's threads hold no lock it needs
            )

    def _environment(self) -> dict[str, str]:
        path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
        return {"PATH": path, "SLURM_CONF": str(self.slurm_conf), "LC_ALL": "C"}

    def _wait(self, name: str, ready: Any) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise SlurmSiteError(f"{name} is not ready after {_START_SECONDS:g} s: {self._last_line(name)}")
            time.sleep(0.05)

    def _end(self, name: str, how: signal.Signals) -> None:
        process = self._processes.pop(name)
        process.send_signal(how)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _end_leftovers(self) -> None:
        """Jobs that were not to be cancelled, and their guardians: they outlive the node's daemon."""
        mark = f"SLURM_CONF={self.slurm_conf}".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes().split(b"\0"):
                    os.kill(int(path.parent.name), signal.SIGKILL)

    def _last_line(self, name: str) -> str:
        text = (self.directory / f"{name}.log").read_text(errors="replace")
        if name == "munged" and (log := self.directory / "munged.log").exists():
            text += log.read_text(errors="replace")
        lines = text.strip().splitlines()
        return lines[-1] if lines else "no message"
