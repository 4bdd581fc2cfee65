"""Root directory of the tests' HTCondor: the files of a Debian release that has its daemons.

`main` (`make servers` runs it) builds it once for the machine, or says in one line why that cannot be.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from .debian_root import CACHE, ForbiddenError, ObstacleError, build_once, not_served, run, unpack

__all__ = ["ROOT", "check", "main"]

_RELEASE = "trixie"
_PACKAGES = ("condor", "base-files", "coreutils", "dash", "libc-bin")
ROOT = CACHE / f"htcondor-{_RELEASE}-1"
"""Path of the root directory, complete or absent; read-only."""

_PROGRAMS = ("apt-get", "chroot", "dpkg-deb", "nsenter", "unshare")
_USERS = {"root": 0, "condor": 64001, "pilot": 64002, "nobody": 65534}


def check() -> None:
    """See that it can be had here, and is there.

    Raises:
        ObstacleError: it cannot, or is not.
    """
    _check_machine()
    if not ROOT.exists():
        if (reason := not_served(ROOT)) is not None:
            raise ForbiddenError(reason)
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
        build_once(ROOT, _build)
    except (ObstacleError, OSError, subprocess.SubprocessError) as obstacle:
        print(f"tests of HTCondor will be skipped: {obstacle}")


def _build(directory: Path) -> None:
    root = unpack(_RELEASE, _PACKAGES, directory)
    run("chroot", str(root), "/usr/sbin/ldconfig")
    passwd = [f"{name}:x:{number}:{number}::/:/bin/sh\n" for name, number in _USERS.items()]
    (root / "etc/passwd").write_text("".join(passwd))
    (root / "etc/group").write_text("".join(f"{name}:x:{number}:\n" for name, number in _USERS.items()))
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n")
    for each in ("srv", "proc", "dev"):
        (root / each).mkdir(exist_ok=True)
