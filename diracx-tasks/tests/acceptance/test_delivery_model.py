"""The search of all states of the delivery protocol (`make model`) holds, and can fail."""

from __future__ import annotations

import subprocess
import sys
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
    ("without", "only", "violation"),
    [
        ("--without-lease-timer", "is cut off", "has two holders that act"),
        ("--without-another-term", "the server is away", "t2 has begun 2 times"),
    ],
)
def test_the_search_finds_what_is_wrong_without_a_part_of_the_protocol(
    without: str, only: str, violation: str
) -> None:
    found = _search(without, "--only", only)

    assert (found.returncode, violation in found.stdout) == (1, True), found.stdout + found.stderr
