"""The chaos driver itself: the seed decides the plan, and the verdict sees what was broken."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[3]))
from chaos import plan as plans
from chaos.drive import Observed
from chaos.plan import Plan, Planned
from chaos.processes import History
from chaos.verdict import Verdict
from chaos.witness import Run
from chaos.witness import Testimony as Told  # pytest takes a name that begins with Test for a test

LEASE = 2.0


def promises(runs: list[Run], history: History | None = None, **observed: Any) -> dict[str, Any]:
    """Two tasks with one mutex; what is not kept, by name."""
    plan = Plan([Planned(0, "Locked", (1, "k")), Planned(0, "Locked", (2, "k"))], [], 10)
    seen = Observed(history or History(), 0.0, rested=11.0, submitted={1: "Locked", 2: "Locked"}, **observed)
    beats = [Run("Beat", 0, 9, 1.0, 1.0, "ok")]
    verdict = Verdict(plan, seen, Told([*runs, *beats]), LEASE)
    return {promise.name: promise.value for promise in verdict.promises() if promise.kept is False}


def run(n: int, start: float, end: float | None, pid: int = 7, how: str = "ok") -> Run:
    return Run("Locked", n, pid, start, end, how if end is not None else "")


def test_the_seed_decides_the_plan() -> None:
    def make(seed: int) -> Plan:
        return plans.make(seed=seed, seconds=20, number=1000, workers=4, schedulers=2, lease=LEASE)

    assert make(1) == make(1)
    assert make(1) != make(2)
    assert {planned.kind for planned in make(1).submissions} >= {"Kills", "KillsLocked", "Rated", "GroupDone"}


def test_all_kept() -> None:
    assert promises([run(1, 1, 2), run(2, 2.1, 3)]) == {}


@pytest.mark.parametrize(
    ("runs", "broken"),
    [
        ([run(1, 1, 2), run(2, 1.5, 3)], "mutual-exclusion violations"),
        ([run(1, 1, 2), run(2, 2.1, 3), run(2, 4, 5)], "executed more than once without a reason"),
        ([run(1, 1, 2)], "executed at least once, %"),
        ([run(1, 1, 2), run(2, 3, 4, how="RuntimeError")], "never finished"),
    ],
)
def test_a_broken_promise_is_seen(runs: list[Run], broken: str) -> None:
    assert broken in promises(runs)


def test_the_death_of_its_worker_explains_a_second_execution_and_ends_the_first() -> None:
    killed = History(killed={7: 1.5}, ended={7: (1.6, -9)})
    runs = [run(1, 1, None), run(2, 4, 5, pid=8), run(1, 6, 7, pid=8)]
    assert promises(runs, killed) == {}
    assert "mutual-exclusion violations" in promises([run(1, 1, None), run(2, 1.4, 1.6, pid=8)], killed)


def test_only_a_pause_beyond_the_lease_is_an_excuse() -> None:
    runs = [run(1, 1, 6, how="CancelledError"), run(2, 4, 4.5, pid=8), run(1, 5, 5.5, pid=8)]
    assert promises(runs, History(pauses={7: [(1.5, 5.9)]})) == {}
    assert set(promises(runs, History(pauses={7: [(1.5, 1.7)]}))) == {
        "mutual-exclusion violations",
        "executed more than once without a reason",
    }


def test_dead_letters_keys_and_exits_that_nobody_expected_are_seen() -> None:
    broken = promises(
        [run(1, 1, 2), run(2, 2.1, 3)],
        History(started={5: 0.0}, ended={5: (20.0, 1)}),
        letters=[{"n": 1, "kind": "Locked", "reason": "poison", "detail": ""}],
        leftover_keys=["k"],
    )
    assert set(broken) == {
        "dead letters that nobody expected",
        "Redis keys left over",
        "processes that ended by themselves or stopped badly",
    }
