"""Upper bounds of the round trips, commands and bytes of a task. `make bench-count` shows the figures."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from support.paths import ROOT

#: Per task: round trips, commands, bytes sent (with each script once), bytes received; about 5 % above the counts,
#: which differ with the length of the names of workers and tasks.
MOST = {
    "enqueue one by one": (1.01, 1.0, 200, 30),
    "enqueue in bulk": (0.01, 1.0, 200, 5),
    "enqueue in bulk, delayed": (0.02, 7.5, 280, 5),
    "drain": (0.1, 1.0, 235, 185),
    "drain, one mutex per task": (0.15, 8.8, 690, 195),
    "drain, results kept": (0.1, 5.1, 400, 185),
    "drain, delayed": (0.15, 2.5, 235, 620),  # 470 on a quiet machine; the slower it is, the smaller the batches
    "drain, failed once": (0.2, 12.5, 1550, 1700),
    "drain, a callback group": (0.13, 7.5, 320, 230),
    "drain, one mutex for all": (3.4, 75, 3300, 13500),
    "one at a time": (2.3, 9, 1100, 280),
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


def test_every_scenario_stays_within_its_counts(counts):
    assert counts.keys() == MOST.keys()
