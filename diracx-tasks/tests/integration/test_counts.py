"""Upper bounds of the round trips, commands and bytes of a task. `make bench-count` shows the figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

#: Per task: round trips, commands, bytes sent (with each script once), bytes received; about 5 % above the counts,
#: which differ with the length of the names of workers and tasks.
MOST = {
    "enqueue one by one": (1.01, 1.0, 200, 30),
    "enqueue in bulk": (0.01, 1.0, 200, 5),
    "enqueue in bulk, delayed": (0.02, 7.5, 280, 5),
    "drain": (0.1, 1.0, 235, 185),
    "drain, one mutex per task": (0.15, 8.8, 690, 195),
    "drain, results kept": (0.1, 5.1, 400, 185),
    "drain, delayed": (0.15, 2.5, 235, 470),
    "drain, failed once": (0.25, 17.5, 1400, 1700),
    "drain, a callback group": (0.13, 7.5, 320, 230),
    "drain, one mutex for all": (5.2, 80, 3800, 13500),
    "one at a time": (4.1, 13, 1600, 450),
}


@pytest.fixture(scope="module")
def counts():
    command = [sys.executable, "-m", "benchmarks.counts", "--tasks", "1000", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=100)
    return json.loads(done.stdout)


@pytest.mark.parametrize("scenario", MOST)
def test_a_task_costs_no_more_than_this(counts, scenario):
    found = tuple(counts[scenario].values())
    assert all(number <= most for number, most in zip(found, MOST[scenario], strict=True)), (found, MOST[scenario])


def test_every_scenario_is_held(counts):
    assert counts.keys() == MOST.keys()
