"""Upper bounds of the round trips, commands and bytes of a task. `make bench-count` shows the figures."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from support.paths import ROOT

#: Per task: round trips, commands, bytes sent (with each script once), bytes received. A drain on a busy machine
#: has smaller batches: its bounds are up to twice the counts on a quiet one, the others' about 5 % above them.
MOST = {
    "enqueue one by one": (1.01, 1.0, 205, 30),
    "enqueue in bulk": (0.01, 1.0, 200, 5),
    "enqueue in bulk, delayed": (0.02, 7.5, 280, 5),
    "drain": (0.2, 1.2, 300, 200),
    "drain, one mutex per task": (0.25, 9, 800, 230),
    "drain, results kept": (0.2, 5.5, 500, 200),
    "drain, delayed": (0.25, 3, 300, 800),
    "drain, failed once": (0.3, 13, 2000, 2200),
    "drain, a callback group": (0.2, 7.5, 400, 260),
    "drain, one mutex for all": (3.4, 75, 3500, 13500),
    "one at a time": (2.3, 9, 1100, 280),
}


@pytest.fixture(scope="module")
def counts():
    command = [sys.executable, "-m", "benchmarks.counts", "--tasks", "1000", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=100)
    return json.loads(done.stdout)


@pytest.mark.parametrize("scenario", MOST)
def test_a_task_stays_within_its_round_trips_commands_and_bytes(counts, scenario):
    found = tuple(counts[scenario].values())
    assert all(number <= most for number, most in zip(found, MOST[scenario], strict=True)), (found, MOST[scenario])


def test_every_scenario_has_bounds(counts):
    assert counts.keys() == MOST.keys()
