"""Unpacks packages of a Debian release, which need not be this machine's own, into a directory.

The mirror is the one that apt uses for this machine's own Debian.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ..paths import NO_AUTHORITY

__all__ = ["CACHE", "KEYRING", "ForbiddenError", "ObstacleError", "build_once", "not_served", "run", "unpack"]

CACHE = Path("/var/cache/gubbins-tests")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_SECONDS = 600


class ObstacleError(Exception):
    """Not available here; the message names the missing part."""


class ForbiddenError(ObstacleError):
    """It cannot be had on this machine, whatever is installed."""


def build_once(path: Path, build: Callable[[Path], None]) -> None:
    """Build a directory beside its place and rename it, unless it is there: it is complete or missing.

    Raises:
        ObstacleError: why it cannot be built. Of a ForbiddenError the reason is kept: see `not_served`.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _reason(path).unlink(missing_ok=True)
        if path.exists():
            return
        try:
            with _beside(path) as directory:
                build(directory)
                (directory / "root").rename(path)
        except ForbiddenError as obstacle:
            _reason(path).write_text(str(obstacle))
            raise


def not_served(path: Path) -> str | None:
    """Return why the mirrors of this machine lack the packages of a directory."""
    return _reason(path).read_text() if _reason(path).exists() else None


def _reason(path: Path) -> Path:
    return path.with_name(f"{path.name}.not-served")


def unpack(release: str, packages: tuple[str, ...], directory: Path) -> Path:
    """Unpack packages and their dependencies into the `root` of a directory.

    Raises:
        ForbiddenError: the mirror does not serve them.
        ObstacleError: a program fails.
    """
    apt = directory / f"apt-{release}"
    for each in ("lists/partial", "archives/partial"):
        (apt / each).mkdir(parents=True)
    (apt / "status").touch()
    (apt / "sources.list").write_text(f"deb [signed-by={KEYRING}] {_mirror()} {release} main\n")
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
        run(*apt_get, "update")
        run(*apt_get, "install", "--yes", "--download-only", *packages)
    except (ObstacleError, subprocess.TimeoutExpired) as obstacle:
        raise ForbiddenError(f"the mirror does not serve Debian {release} here: {obstacle}") from obstacle
    root = directory / "root"
    root.mkdir(exist_ok=True)
    for package in sorted((apt / "archives").glob("*.deb")):
        run("dpkg-deb", "--extract", str(package), str(root))
    return root


def _mirror() -> str:
    """Return the mirror of this machine's apt."""
    if not KEYRING.exists():
        raise ObstacleError("no debian-archive-keyring is installed")
    targets = run("apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(COMPONENT)|$(REPO_URI)",
               "Created-By: Packages")  # fmt: skip
    for line in targets.splitlines():
        origin, label, component, uri = line.split("|", 3)
        if (origin, label, component) == ("Debian", "Debian", "main"):
            return uri
    raise ForbiddenError("apt knows no Debian mirror")


def run(*command: str) -> str:
    """Run a program and return its output.

    Raises:
        ObstacleError: it fails, with the last line of what it says.
    """
    # Programs that fetch packages need the authorities that tests do without.
    env = {name: value for name, value in os.environ.items() if value != str(NO_AUTHORITY)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_SECONDS, env=env)
    if done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise ObstacleError(f"{command[0]}: {words[-1]}")
    return done.stdout


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A directory for atomic renames, deleted afterwards."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="building-") as name:
        yield Path(name)
