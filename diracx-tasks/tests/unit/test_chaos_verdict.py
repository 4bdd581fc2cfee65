"""The chaos driver itself: the seed decides the plan, and the verdict sees what was broken."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
from support.paths import ROOT

sys.path.append(str(ROOT))
from chaos import plan as plans
from chaos.drive import Observed
from chaos.figures import Case, report
from chaos.plan import PROFILES, Plan, Planned
from chaos.processes import History
from chaos.records import Records, Run
from chaos.redis_servers import Outage
from chaos.verdict import ChaosResult

LEASE = 2.0
OVERLAPS = "overlaps of mutually exclusive executions"
RESUMED = "— after a paused process was resumed (SIGCONT)"
TWICE = "executed more than once without a reason"


def verdict_of(runs: list[Run], history: History | None = None, **observed: Any) -> ChaosResult:
    """Two tasks with one mutex."""
    plan = Plan([Planned(0, "Locked", (1, "k")), Planned(0, "Locked", (2, "k"))], [], 10)
    known: dict[str, Any] = {"submitted": {1: "Locked", 2: "Locked"}, "acknowledged": {1: 0.5, 2: 0.5}}
    seen = Observed(history or History(), 0.0, rested=11.0, **known | observed)
    beats = [Run("Beat", 0, 9, 1.0, 1.0, "ok")]
    return ChaosResult(plan, seen, Records([*runs, *beats]), LEASE)


def promises(runs: list[Run], history: History | None = None, **observed: Any) -> dict[str, Any]:
    """Return the broken promises by name."""
    found = verdict_of(runs, history, **observed).promises()
    return {promise.name: promise.value for promise in found if promise.kept is False}


def values_of(runs: list[Run], history: History | None = None, **observed: Any) -> dict[str, Any]:
    """Return the values of all promises, by name."""
    return {each.name: each.value for each in verdict_of(runs, history, **observed).promises()}


def run(n: int, start: float, end: float | None, pid: int = 7, how: str = "ok") -> Run:
    return Run("Locked", n, pid, start, end, how if end is not None else "")


def test_the_seed_decides_the_plan() -> None:
    def make(seed: int) -> Plan:
        return plans.make(seed=seed, profile="all", seconds=20, number=1000, workers=4, lease=LEASE)

    assert make(1) == make(1)
    assert make(1) != make(2)
    assert {planned.kind for planned in make(1).submissions} >= {
        *("Kills", "KillsLocked", "Rated", "GroupDone", "Once", "Newer", "LockedLong", "ReadsLong", "Writes")
    }


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_causes_its_failures(profile: str) -> None:
    plan = plans.make(seed=1, profile=profile, seconds=120, number=1000, workers=4, lease=LEASE)
    words = {"processes": "worker", "net": "link", "server": "server", "sql": "database"}
    disturbed = {family for family, word in words.items() if any(word in d.what for d in plan.disturbances)}
    assert disturbed >= set(PROFILES[profile][0])


def test_without_losses_every_promise_is_reported_as_kept() -> None:
    assert promises([run(1, 1, 2), run(2, 2.1, 3)]) == {}


@pytest.mark.parametrize(
    ("runs", "broken"),
    [
        ([run(1, 1, 2), run(2, 1.5, 3)], OVERLAPS),
        ([run(1, 1, 2), run(2, 2.1, 3), run(2, 4, 5)], TWICE),
        ([run(1, 1, 2)], "acknowledged tasks lost"),
        ([run(1, 1, 2), run(2, 3, 4, how="RuntimeError")], "acknowledged tasks lost"),
    ],
)
def test_a_broken_promise_is_detected(runs: list[Run], broken: str) -> None:
    assert broken in promises(runs)


def test_the_death_of_its_worker_explains_a_second_execution_and_ends_the_first() -> None:
    killed = History(killed={7: 1.5}, ended={7: (1.6, -9)})
    runs = [run(1, 1, None), run(2, 4, 5, pid=8), run(1, 6, 7, pid=8)]
    assert promises(runs, killed) == {}
    assert values_of(runs, killed)["— its worker was killed"] == 1
    assert OVERLAPS in promises([run(1, 1, None), run(2, 1.4, 1.6, pid=8)], killed)


def test_only_a_pause_beyond_the_lease_is_a_reason_for_a_second_execution() -> None:
    runs = [run(1, 1, 6, how="CancelledError"), run(2, 4, 4.5, pid=8), run(1, 6.1, 6.5, pid=8)]
    assert promises(runs, History(pauses={7: [(1.5, 5.9)]})) == {}
    assert set(promises(runs, History(pauses={7: [(1.5, 1.7)]}))) == {OVERLAPS, TWICE}


@pytest.mark.parametrize(("goes_on_seconds", "kept"), [(0.2, True), (0.3, False)])
def test_a_resumed_process_may_continue_only_briefly(goes_on_seconds: float, kept: bool) -> None:
    runs = [run(1, 1, 5 + goes_on_seconds, how="CancelledError"), run(2, 4, 6, pid=8), run(1, 6.1, 6.5, pid=8)]
    found = verdict_of(runs, History(pauses={7: [(1.5, 5.0)]})).promises()
    assert {each.name: each.kept for each in found}[RESUMED] is kept
    assert {each.name: each.kept for each in found}[OVERLAPS] is True


@pytest.mark.parametrize(("paused", "kept"), [(True, True), (False, False)])
def test_recovery_is_judged_by_the_time_with_a_live_worker(paused: bool, kept: bool) -> None:
    """One worker is killed, and the other one of its size takes 5 s, in which it is paused or not."""

    def quick(n: int, start: float, end: float | None, pid: int) -> Run:
        return Run("Quick", n, pid, start, end, "ok" if end is not None else "")

    runs = [quick(0, 0.5, 0.6, 8), *(quick(n, 1, None, 7) for n in range(1, 6))]
    history = History(
        killed={7: 1.5},
        started={7: 0.0, 8: 0.0},
        names={7: "worker-0", 8: "worker-2"},
        pauses={8: [(1.4, 6.5)]} if paused else {},
    )
    found = verdict_of([*runs, *(quick(n, 6.6, 6.7, 8) for n in range(1, 6))], history).promises()
    [recovery] = [promise for promise in found if promise.name.startswith("recovery, worker killed")]
    assert recovery.kept is kept
    assert (recovery.value.p50, recovery.value.p50_up) == (5.1, 0.1 if paused else 5.1)


def test_an_overlap_is_a_violation_even_after_a_disconnection() -> None:
    runs = [run(1, 1, 6, how="CancelledError"), run(2, 5.9, 6.5, pid=8), run(1, 7, 7.5, pid=8)]
    disconnected = History(names={7: "worker-0"}, disconnected={"worker-0": [(1.5, 5.9)]})
    assert set(promises(runs, disconnected)) == {OVERLAPS}
    assert set(promises(runs, outages=[Outage("pause server", 1.5, 5.5, over=5.5)])) == {OVERLAPS}


def test_tasks_acknowledged_just_before_a_data_loss_are_counted_separately() -> None:
    outage = Outage("kill server", 1.0, 2.0, lost_from=0.4, lost_until=2.0, over=2.0)
    assert promises([run(1, 3, 4)], outages=[outage]) == {}
    assert values_of([run(1, 3, 4)], outages=[outage])["acknowledged tasks lost with the server's data"] == 1
    earlier = {1: 0.3, 2: 0.3}
    assert promises([run(1, 3, 4)], outages=[outage], acknowledged=earlier) == {"acknowledged tasks lost": 1}
    everything = Outage("kill server", 1.0, 2.0, -math.inf, lost_until=2.0, over=2.0)
    assert promises([run(1, 3, 4)], outages=[everything], acknowledged=earlier) == {}


def test_a_submission_without_a_reply_may_have_arrived_or_not() -> None:
    assert promises([run(1, 1, 2)], acknowledged={1: 0.5}) == {}
    assert promises([run(1, 1, 2), run(2, 3, 4)], acknowledged={1: 0.5}) == {}


def test_unexpected_dead_letters_keys_and_exits_are_detected() -> None:
    broken = promises(
        [run(1, 1, 2), run(2, 2.1, 3)],
        History(started={5: 0.0}, ended={5: (40.0, 1)}),
        dead_letters=[{"n": 1, "kind": "Locked", "reason": "poison", "detail": ""}],
        leftover_keys=["k"],
    )
    assert set(broken) == {
        "unexpected dead letters",
        "Redis keys left over",
        "processes that crashed or failed to stop",
    }


@pytest.mark.parametrize(("killed", "kept"), [(4, True), (3, False)])
def test_a_task_is_poison_after_the_given_number_of_crashes(killed: int, kept: bool) -> None:
    """The last worker may only have been disconnected; before some of the others the server may have lost data."""
    runs = [run(1, 10 * n, None if n <= killed else 42, pid=n) for n in range(1, 5)]
    history = History(
        killed={n: 10 * n + 1 for n in range(1, killed + 1)},
        names={4: "worker-3"},
        disconnected={} if kept else {"worker-3": [(40.5, 45.0)]},
    )
    broken = promises(
        [*runs, run(2, 50, 51)],
        history,
        outages=[Outage("kill server", 19.0, 19.5, 18.0, lost_until=20.5, over=20.5)],
        dead_letters=[{"n": 1, "kind": "Locked", "reason": "poison", "detail": ""}],
    )
    assert ("unexpected dead letters" in broken) is not kept


def test_a_failed_run_is_listed_in_the_figures() -> None:
    case = Case("sql", "none")
    good = {"seed": 1, "broken": [], "tasks submitted": 1200, "acknowledged tasks lost": 0, "notes": {}}
    failed = {"seed": 2, "failed": "did not end"}
    text = report({case: [good, failed]}, 120)
    assert "| sql on none | 1 of 2 | 1,200 | 0 |" in text
    assert "- sql on none, seed 2: did not end" in text
