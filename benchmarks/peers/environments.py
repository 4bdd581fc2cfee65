"""Virtual environments of the peers, below `.bench/`, renewed when their requirements change."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from .catalogue import Command, Peer

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / ".bench"
_HERE = Path(__file__).parent
#: Environments whose tasks are found through entry points, as those of installed packages are.
_WITH_ENTRY_POINTS = {"ours", "reference"}
_TASKS = ("NoOp", "ReturnOne", "Nap", "Clock", "Due", "OwnMutex", "Alone")


class EnvironmentFailedError(RuntimeError):
    """A virtual environment could not be made."""


def requirements(name: str) -> Path:
    return _HERE / f"requirements-{name}.txt"


def prepare(name: str) -> Path:
    """The directory of the environment, made first where it is missing or out of date.

    Raises:
        EnvironmentFailedError: with the end of what pip said.
    """
    directory = ENVIRONMENTS / name
    if is_ready(name):
        return directory
    print(f"making {directory.relative_to(ROOT)} from {requirements(name).relative_to(ROOT)}", file=sys.stderr)
    _run([sys.executable, "-m", "venv", "--clear", str(directory)])
    pip = [str(directory / "bin/python"), "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    _run([*pip, "--requirement", str(requirements(name))])
    if name in _WITH_ENTRY_POINTS:
        _register_tasks(directory)
    (directory / "stamp").write_text(_fingerprint(name))
    return directory


def is_ready(name: str) -> bool:
    """True if the environment is there and up to date."""
    stamp = ENVIRONMENTS / name / "stamp"
    return stamp.exists() and stamp.read_text() == _fingerprint(name)


def command_in(directory: Path, command: Command) -> list[str]:
    """The command with the program of this environment."""
    return [str(directory / "bin" / command[0]), *command[1:]]


def variables(url: str, meter: Path, *, results: bool = False) -> dict[str, str]:
    """The environment variables of whatever runs in such an environment: nothing of ours leaks in."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR", "TZ") if name in os.environ}
    return {
        **kept,
        "PYTHONPATH": str(ROOT),
        "BENCH_REDIS_URL": url,
        "BENCH_METER": str(meter),
        "BENCH_RESULTS": "1" if results else "0",
        "DIRACX_TASKS_REDIS_URL": url,
        "DIRACX_LOG_LEVEL": "WARNING",  # 0.7.0 has no option for it, and logs every task
        "OTEL_SDK_DISABLED": "true",
    }


def _fingerprint(name: str) -> str:
    parts = [sys.version, requirements(name).read_text(), *(_TASKS if name in _WITH_ENTRY_POINTS else ())]
    if name == "ours":  # the code itself is installed in place, what it needs is not
        parts += [(ROOT / path).read_text() for path in ("constraints.txt", "diracx-tasks/pyproject.toml")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EnvironmentFailedError(f"{' '.join(command[:4])} …: {(done.stderr or done.stdout)[-1000:].strip()}")


def _register_tasks(directory: Path) -> None:
    """Make the tasks of the benchmark known as those of an installed extension are."""
    [packages] = directory.glob("lib/python*/site-packages")
    module = "benchmarks.peers.adapters.diracx_tasks"
    tasks = "".join(f"{name} = {module}:{name}\n" for name in _TASKS)
    entry_points = f"[diracx]\nextension = benchmarks\n\n[diracx.tasks.bench]\n{tasks}"
    information = packages / "diracx_tasks_benchmark-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: diracx-tasks-benchmark\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(entry_points)


def version_of(peer: Peer, package: str) -> str:
    """The version that is pinned for a peer."""
    for line in requirements(peer.environment).read_text().splitlines():
        name, _, version = line.partition("==")
        if name.strip() == package:
            return version.strip()
    return ""
