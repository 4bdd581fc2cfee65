"""Model checking of the delivery protocol (`make model`): it passes, and finds injected errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT
from support.waiting import eventually


def _search(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "model", "--processes", "1", *options]
    return subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_every_interleaving_without_failures_keeps_the_promises() -> None:
    found = _search("--disturbances", "0")

    assert (found.returncode, "everything holds\n" in found.stdout) == (0, True), found.stdout + found.stderr


@pytest.mark.parametrize(
    ("without", "only", "tasks", "violation"),
    [
        ("--without-lease-timer", "is disconnected", ["t0", "t1"], "has two holders that act"),
        ("--without-new-leases", "the server is unavailable", ["t2"], "t2 has begun 2 times"),
    ],
)
def test_the_model_checker_finds_a_violation_for_each_removed_part_of_the_protocol(
    without: str, only: str, tasks: list[str], violation: str
) -> None:
    found = _search(without, "--only", only, "--tasks", *tasks)

    assert (found.returncode, violation in found.stdout) == (1, True), found.stdout + found.stderr


def test_processes_and_servers_end_with_a_search_that_is_killed() -> None:
    command = [sys.executable, "-m", "model", "--processes", "2", "--disturbances", "2"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as search:
        try:
            begun: dict[int, str] = {}

            def servers() -> int:
                begun.update(_below(search.pid))
                return len([name for name in begun.values() if "valkey" in name])

            eventually(lambda: servers() >= 2, "each process has started its server")
        finally:
            search.kill()
    eventually(lambda: not any(name and _name_of(pid) == name for pid, name in begun.items()), "none is left")


def _below(pid: int) -> dict[int, str]:
    """Names of all processes that have come from this one."""
    children = [
        int(child)
        for thread in Path(f"/proc/{pid}/task").iterdir()
        for child in (thread / "children").read_text().split()
    ]
    found = {child: _name_of(child) for child in children}
    for child in children:
        found |= _below(child)
    return found


def _name_of(pid: int) -> str:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return "" if state == "Z" else Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
