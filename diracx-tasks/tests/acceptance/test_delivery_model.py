"""The search of all states of the delivery protocol (`make model`) holds, and can fail."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[3]


def _search(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "model", "--processes", "1", *options]
    return subprocess.run(command, check=False, cwd=_ROOT, capture_output=True, text=True, timeout=300)


def test_every_order_of_steps_without_a_disturbance_keeps_the_promises() -> None:
    found = _search("--disturbances", "0")

    assert (found.returncode, "everything holds\n" in found.stdout) == (0, True), found.stdout + found.stderr


@pytest.mark.parametrize(
    ("without", "only", "tasks", "violation"),
    [
        ("--without-lease-timer", "is cut off", ["t0", "t1"], "has two holders that act"),
        ("--without-another-term", "the server is away", ["t2"], "t2 has begun 2 times"),
    ],
)
def test_the_search_finds_what_is_wrong_without_a_part_of_the_protocol(
    without: str, only: str, tasks: list[str], violation: str
) -> None:
    found = _search(without, "--only", only, "--tasks", *tasks)

    assert (found.returncode, violation in found.stdout) == (1, True), found.stdout + found.stderr


def test_processes_and_servers_end_with_a_search_that_is_killed() -> None:
    command = [sys.executable, "-m", "model", "--processes", "2", "--disturbances", "2"]
    with subprocess.Popen(command, cwd=_ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as search:
        try:
            deadline = time.monotonic() + 60
            begun: dict[int, str] = {}
            while len([name for name in begun.values() if "valkey" in name]) < 2:
                assert time.monotonic() < deadline, "not every process has started its server"
                begun = _below(search.pid)
        finally:
            search.kill()
    while left := [pid for pid, name in begun.items() if _name_of(pid) == name]:
        assert time.monotonic() < deadline, f"{left} are left"
        time.sleep(0.05)


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
