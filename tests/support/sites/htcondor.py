"""A pytest plugin: `htcondor_site`, an HTCondor pool of the tests' own on the loopback interface.

It runs for one file of tests, as its daemons never rest, in namespaces of its own, on the files that
`htcondor_root` has unpacked: what it mounts and starts ends with the first of its processes. What cannot be had
here is skipped, with a line that says what is missing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from diracx.tasks.testing.server import free_port
from support.machine import not_for_this_machine
from support.waiting import eventually
from support.warm_commands import WarmCommands

from .debian_root import ForbiddenError, ObstacleError
from .htcondor_root import ROOT, check

SCHEDD = "pilots@tests"
_SECONDS = 110  # it takes three, unless the machine is busy
_CONDOR = 64001

_START = """\
set -e
mount --bind "$2" "$1/srv"
mount --rbind /dev "$1/dev"
mount -t proc proc "$1/proc"
# HTCondor would tune the kernel that all share.
mount --bind "$1/proc/sys" "$1/proc/sys"
mount -o remount,bind,ro "$1/proc/sys"
exec chroot "$1" /usr/sbin/condor_master -f
"""

_CONFIGURATION = """\
RELEASE_DIR = /usr
LIBEXEC = /usr/libexec/condor
LOCAL_DIR = /srv
LOG = /srv/log
SPOOL = /srv/spool
EXECUTE = /srv/execute
RUN = /srv/run
LOCK = /srv/run
DAEMON_SOCKET_DIR = /srv/run
CONDOR_IDS = 64001.64001
DAEMON_LIST = MASTER COLLECTOR NEGOTIATOR SCHEDD STARTD
CONDOR_HOST = 127.0.0.1
COLLECTOR_HOST = 127.0.0.1:{port}
SHARED_PORT_PORT = {port}
NETWORK_INTERFACE = 127.0.0.1
BIND_ALL_INTERFACES = False
ENABLE_IPV6 = False
NO_DNS = True
DEFAULT_DOMAIN_NAME = tests
UID_DOMAIN = tests
TRUST_DOMAIN = tests
FILESYSTEM_DOMAIN = tests
SCHEDD_NAME = {schedd}
SEC_DEFAULT_AUTHENTICATION = REQUIRED
SEC_DEFAULT_AUTHENTICATION_METHODS = FS, IDTOKENS
SEC_DEFAULT_INTEGRITY = REQUIRED
SEC_DEFAULT_ENCRYPTION = REQUIRED
SEC_PASSWORD_DIRECTORY = /srv/keys
SEC_TOKEN_SYSTEM_DIRECTORY = /srv/none
ALLOW_READ = *@tests
ALLOW_WRITE = *@tests
ALLOW_DAEMON = root@tests condor@tests
ALLOW_ADMINISTRATOR = root@tests condor@tests
ALLOW_NEGOTIATOR = root@tests condor@tests
NUM_CPUS = 200
MEMORY = 200000
SLOT_TYPE_1 = 100%
NUM_SLOTS_TYPE_1 = 1
SLOT_TYPE_1_PARTITIONABLE = True
START = True
SUSPEND = False
PREEMPT = False
KILL = False
RUNBENCHMARKS = False
UPDATE_INTERVAL = 5
NEGOTIATOR_INTERVAL = 1
NEGOTIATOR_MIN_INTERVAL = 1
NEGOTIATOR_CYCLE_DELAY = 1
SCHEDD_INTERVAL = 1
SCHEDD_MIN_INTERVAL = 1
PERIODIC_EXPR_INTERVAL = 1
JOB_START_DELAY = 0
JOB_DEFAULT_REQUESTDISK = 1024
JOB_DEFAULT_REQUESTMEMORY = 16
MASTER_BACKOFF_CONSTANT = 1
ENABLE_KERNEL_TUNING = False
MOUNT_PRIVATE_DEV_SHM = False
MOUNT_UNDER_SCRATCH =
BASE_CGROUP =
ENABLE_URL_TRANSFERS = False
FILETRANSFER_PLUGINS =
HIBERNATION_PLUGIN =
DOCKER =
JAVA =
SINGULARITY =
MAIL =
"""


class HTCondorSite:
    """A pool with one schedd and one node, in a directory: `collector`, `schedd`, and the file of a `token`.

    `bindings` calls it with HTCondor's bindings.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.schedd = SCHEDD
        self.token = directory / "pilot.token"
        self._port = free_port()
        self.collector = f"127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None
        self.bindings = WarmCommands("htcondor2")
        for name in ("log", "spool", "execute", "run"):
            (directory / name).mkdir(mode=0o755)
            os.chown(directory / name, _CONDOR, _CONDOR)
        (directory / "keys").mkdir(mode=0o700)
        (directory / "keys/POOL").write_bytes(os.urandom(64))
        (directory / "keys/POOL").chmod(0o600)
        self.configure("")

    def configure(self, addition: str) -> None:
        """Write the configuration with additional lines, for the next reconfiguration of the daemons."""
        text = _CONFIGURATION.format(port=self._port, schedd=self.schedd)
        (self.directory / "condor_config").write_text(text + addition)

    @contextlib.contextmanager
    def configured(self, addition: str) -> Iterator[None]:
        """Inside the block the schedd is configured differently."""
        self.configure(addition)
        try:
            self.run("condor_reconfig", "-schedd")
            yield
        finally:
            self.configure("")
            self.run("condor_reconfig", "-schedd")

    def start(self) -> None:
        """Start it; return when it has a node."""
        with (self.directory / "master.out").open("wb") as log:
            self._process = subprocess.Popen(
                ["unshare", "--mount", "--pid", "--fork", "/bin/sh", "-c", _START, "sh", ROOT, self.directory],
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "CONDOR_CONFIG": "/srv/condor_config"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._until_it_has_a_node()
        self.token.write_text(self.make_token("pilot"))
        self.token.chmod(0o600)

    def stop(self) -> None:
        """End all of it, and its jobs: they go with the first process of their namespace."""
        self.bindings.close()
        if self._process is None:
            return
        for pid in _children(self._process.pid):
            os.kill(pid, signal.SIGKILL)
        self._process.wait(_SECONDS)

    def run(self, *command: str) -> str:
        """Run a command of HTCondor as root beside the daemons, and return its output.

        Raises:
            CalledProcessError: it has failed.
        """
        assert self._process is not None
        assert self._process.poll() is None, self._last_words()
        (first,) = _children(self._process.pid)
        done = subprocess.run(
            ["nsenter", f"--target={first}", "--mount", "--pid", "--root", "--wd", *command],
            check=True,
            env={"PATH": "/usr/sbin:/usr/bin", "CONDOR_CONFIG": "/srv/condor_config"},
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
        return done.stdout

    def make_token(self, user: str, *options: str) -> str:
        """Make an IDTOKEN of an authorized user."""
        return self.run("condor_token_create", "-identity", f"{user}@tests", *options)

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """Context in which its port is closed; running jobs continue."""
        (master,) = self._pids("condor_master")
        (listener,) = self._pids("condor_shared_p")
        os.kill(master, signal.SIGSTOP)  # it would start another one
        os.kill(listener, signal.SIGKILL)
        try:
            eventually(lambda: not self._listens())
            yield
        finally:
            os.kill(master, signal.SIGCONT)
            self._until_it_has_a_node()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Context in which it accepts connections and does not respond."""
        (listener,) = self._pids("condor_shared_p")
        os.kill(listener, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(listener, signal.SIGCONT)

    @contextlib.contextmanager
    def frozen_jobs(self) -> Iterator[None]:
        """Context in which the jobs and their supervisors are stopped: none of them ends."""
        stopped = self._pids("condor_shadow") + self._pids("condor_starter")
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in stopped:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def _pids(self, name: str) -> list[int]:
        """The daemons of that name (15 characters, as the kernel has it)."""
        assert self._process is not None
        found, left = [], _children(self._process.pid)
        while left:
            pid = left.pop()
            left += _children(pid)
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                    found.append(pid)
        return found

    def _until_it_has_a_node(self) -> None:
        deadline = time.monotonic() + _SECONDS
        while True:
            with contextlib.suppress(subprocess.CalledProcessError, ValueError):
                if self.run("condor_status", "-af", "Name") and self.run(
                    "condor_status", "-schedd", "-af", "Name"
                ):
                    return
            assert time.monotonic() < deadline, f"HTCondor does not start:\n{self._last_words()}"
            time.sleep(0.1)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0

    def _last_words(self) -> str:
        logs = [self.directory / "master.out", *(self.directory / "log").glob("*Log")]
        return "\n".join(path.read_text(errors="replace")[-1000:] for path in logs if path.exists())


def _children(pid: int) -> list[int]:
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


@pytest.fixture(scope="module")
def htcondor_site() -> Iterator[HTCondorSite]:
    """HTCondor."""
    try:
        check()
    except ForbiddenError as obstacle:
        not_for_this_machine(str(obstacle))
    except ObstacleError as obstacle:
        pytest.skip(str(obstacle))
    if importlib.util.find_spec("htcondor2") is None:
        pytest.skip("HTCondor's bindings are not installed: pip install htcondor")
    directory = Path(tempfile.mkdtemp(prefix="gubbins-htcondor-site-"))
    directory.chmod(0o755)
    site = HTCondorSite(directory)
    try:
        site.start()
        yield site
    finally:
        site.stop()
        shutil.rmtree(directory, ignore_errors=True)
