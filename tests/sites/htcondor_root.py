"""What the tests' HTCondor runs in: the files of a Debian release that has its daemons, unpacked.

The mirror is the one that apt uses for this machine's own Debian. Run as a program (`make servers` does), this
builds it once for the machine, or says in one line why that cannot be.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["ROOT", "ForbiddenError", "ObstacleError", "check", "main"]

_RELEASE = "trixie"
_PACKAGES = ("condor", "base-files", "coreutils", "dash", "libc-bin")
_CACHE = Path("/var/cache/gubbins-tests")
ROOT = _CACHE / f"htcondor-{_RELEASE}-1"
"""Where it is, complete or not at all. Not to be written to."""
_NOT_SERVED = ROOT.with_name(f"{ROOT.name}.not-served")
"""Where the reason is kept why the mirror of this machine cannot give it."""

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_PROGRAMS = ("apt-get", "chroot", "dpkg-deb", "nsenter", "unshare")
_SECONDS = 600
_USERS = {"root": 0, "condor": 64001, "pilot": 64002, "nobody": 65534}


class ObstacleError(Exception):
    """It cannot be had here; the message says what is missing."""


class ForbiddenError(ObstacleError):
    """It cannot be had on this machine, whatever is installed."""


def check() -> None:
    """See that it can be had here, and is there.

    Raises:
        ObstacleError: it cannot, or is not.
    """
    _check_machine()
    if not ROOT.exists():
        if _NOT_SERVED.exists():
            raise ForbiddenError(_NOT_SERVED.read_text())
        raise ObstacleError(
            "HTCondor's daemons have not been fetched: `make servers` does it, or says why it cannot"
        )


def _check_machine() -> None:
    if os.geteuid() != 0:
        raise ForbiddenError("HTCondor's daemons are started in a root directory of their own: that takes root")
    for program in _PROGRAMS:
        if shutil.which(program) is None:
            raise ObstacleError(f"HTCondor's daemons cannot be had: there is no program {program}")
    tried = subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], check=False, capture_output=True)
    if tried.returncode != 0:
        raise ForbiddenError("HTCondor's daemons cannot be started: no mount namespaces here")


def main() -> None:
    """Build it, unless it is there or cannot be."""
    try:
        _check_machine()
        _CACHE.mkdir(parents=True, exist_ok=True)
        with (_CACHE / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _NOT_SERVED.unlink(missing_ok=True)
            if not ROOT.exists():
                try:
                    _build()
                except ForbiddenError as obstacle:
                    _NOT_SERVED.write_text(str(obstacle))
                    raise
    except (ObstacleError, OSError, subprocess.SubprocessError) as obstacle:
        print(f"tests of HTCondor will be skipped: {obstacle}")


def _build() -> None:
    with _beside(ROOT) as directory:
        apt = directory / "apt"
        for each in ("lists/partial", "archives/partial"):
            (apt / each).mkdir(parents=True)
        (apt / "status").touch()
        source = f"deb [signed-by={_KEYRING}] {_mirror()} {_RELEASE} main\n"
        (apt / "sources.list").write_text(source)
        # fmt: off
        options = {
            "Dir::State": apt, "Dir::State::status": apt / "status", "Dir::State::lists": apt / "lists",
            "Dir::Cache": apt, "Dir::Cache::archives": apt / "archives",
            "Dir::Etc::sourcelist": apt / "sources.list", "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "APT::Update::Error-Mode": "any",
            "Acquire::Languages": "none", "APT::Install-Recommends": "false", "APT::Sandbox::User": "root",
        }
        # fmt: on
        apt_get = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
        try:
            _run(*apt_get, "update")
            _run(*apt_get, "install", "--yes", "--download-only", *_PACKAGES)
        except (ObstacleError, subprocess.TimeoutExpired) as obstacle:
            raise ForbiddenError(f"the mirror does not serve Debian {_RELEASE} here: {obstacle}") from obstacle
        root = directory / "root"
        root.mkdir()
        for package in sorted((apt / "archives").glob("*.deb")):
            _run("dpkg-deb", "--extract", str(package), str(root))
        _run("chroot", str(root), "/usr/sbin/ldconfig")
        passwd = [f"{name}:x:{number}:{number}::/:/bin/sh\n" for name, number in _USERS.items()]
        (root / "etc/passwd").write_text("".join(passwd))
        (root / "etc/group").write_text("".join(f"{name}:x:{number}:\n" for name, number in _USERS.items()))
        (root / "etc/hosts").write_text("127.0.0.1 localhost\n")
        for each in ("srv", "proc", "dev"):
            (root / each).mkdir(exist_ok=True)
        root.rename(ROOT)


def _mirror() -> str:
    """Where apt gets this machine's own Debian from."""
    if not _KEYRING.exists():
        raise ObstacleError("no debian-archive-keyring is installed")
    told = _run("apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(COMPONENT)|$(REPO_URI)",
                "Created-By: Packages")  # fmt: skip
    for line in told.splitlines():
        origin, label, component, uri = line.split("|", 3)
        if (origin, label, component) == ("Debian", "Debian", "main"):
            return uri
    raise ForbiddenError("apt knows no Debian mirror")


def _run(*command: str) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_SECONDS)
    if done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise ObstacleError(f"{command[0]} (for Debian {_RELEASE}): {words[-1]}")
    return done.stdout


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A directory from which something can be renamed to a path; gone afterwards, with all that is left in it."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="building-") as name:
        yield Path(name)


if __name__ == "__main__":
    main()
