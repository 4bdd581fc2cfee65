"""Requested pilots: one call for all that wait at a compute element, and each task finds its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import event

from gubbins.ces import Observation, Observed, PilotAtCE, SubmitOutcome
from gubbins.db.sql import MyPilotDB, MyPilotStatus
from gubbins.domain import clock
from gubbins.domain.circuit_breaker import CECall
from gubbins.domain.exceptions import (
    CEPausedError,
    CEQuotaError,
    CERefusedError,
    NoRoomError,
    PilotSubmissionError,
)
from gubbins.logic import my_pilots as logic
from gubbins.logic.my_pilots import requested as requested_module

VOS = ("lhcb", "dteam")
Answer = Callable[[Sequence[PilotAtCE]], Mapping[str, SubmitOutcome]]


class Site:
    """The compute element, and what was submitted by each call."""

    def __init__(self) -> None:
        self.calls: list[list[PilotAtCE]] = []
        self.answer: Answer = lambda pilots: {p.stamp: SubmitOutcome(f"job.{p.stamp}") for p in pilots}


@pytest.fixture
def site(scripted: Any, monkeypatch: pytest.MonkeyPatch) -> Site:
    its = Site()

    async def submit(self: Any, pilots: Sequence[PilotAtCE]) -> Any:
        its.calls.append(list(pilots))
        return its.answer(pilots)

    monkeypatch.setattr(scripted, "submit", submit)
    return its


async def requested(db: MyPilotDB, capacity: int, **how: Any) -> list[tuple[str, str]]:
    """A compute element all of whose slots two VOs have requested: stamp and VO of each."""
    await db.add_ce("ce", capacity, 1.0, backend="scripted", **how)
    for vo in VOS:
        await logic.request_pilots(db, vo, vos=VOS)
    return await db.waiting_requests("ce", at_most=10_000)


async def submit(db: MyPilotDB, stamp: str, vo: str) -> Any:
    """Run the task of a request, and return its result or error."""
    try:
        return await logic.submit_requested_pilot(db, "ce", vo, stamp=stamp)
    except PilotSubmissionError as error:
        return error


async def stamps_held(db: MyPilotDB) -> set[str]:
    return {row.stamp for vo in VOS for row in await db.get_active_pilots(vo=vo)}


async def test_the_first_task_submits_for_all_that_wait_and_the_others_find_theirs(
    db: MyPilotDB, site: Site
) -> None:
    asked = await requested(db, 100)
    statements = 0

    def count(*_: object) -> None:
        nonlocal statements
        statements += 1

    event.listen(db.engine.sync_engine, "before_cursor_execute", count)
    pilots = [await submit(db, stamp, vo) for stamp, vo in asked]
    assert statements < 2 * len(asked)
    assert [sorted(pilot.stamp for pilot in call) for call in site.calls] == [sorted(stamp for stamp, _ in asked)]
    assert {(pilot.stamp, pilot.vo) for pilot in site.calls[0]} == set(asked)
    assert not any(pilot.maybe_submitted for pilot in site.calls[0])
    assert len(set(pilots)) == len(asked) == 100
    for (stamp, vo), pilot_id in zip(asked, pilots, strict=True):
        pilot = await db.get_pilot(pilot_id)
        assert (pilot["stamp"], pilot["vo"], pilot["reference"]) == (stamp, vo, f"job.{stamp}")
        assert [step["status"] for step in pilot["history"]] == [MyPilotStatus.SUBMITTED]
    assert await db.waiting_requests("ce", at_most=9) == []


@pytest.mark.parametrize("max_batch", [1, 4, 100])
async def test_a_call_has_no_more_than_max_batch_and_the_own_one_whatever_waits_before_it(
    db: MyPilotDB, site: Site, max_batch: int
) -> None:
    asked = await requested(db, 10, rules={"max_batch": max_batch})
    for stamp, vo in reversed(asked):
        assert isinstance(await submit(db, stamp, vo), int)
    assert [len(call) for call in site.calls] == {1: [1] * 10, 4: [4, 4, 2], 100: [10]}[max_batch]
    assert await stamps_held(db) == {stamp for stamp, _ in asked}


async def test_a_site_that_refuses_half_of_a_call_refuses_these_and_no_others(db: MyPilotDB, site: Site) -> None:
    asked = await requested(db, 8)
    bad = {stamp for stamp, _ in asked[::2]}
    site.answer = lambda pilots: {
        p.stamp: SubmitOutcome(error="no more of you") if p.stamp in bad else SubmitOutcome(f"job.{p.stamp}")
        for p in pilots
    }
    for stamp, vo in asked:
        outcome = await submit(db, stamp, vo)
        assert isinstance(outcome, CERefusedError if stamp in bad else int)
        assert stamp not in bad or "no more of you" in str(outcome)
    assert len(site.calls) == 1
    assert await stamps_held(db) == {stamp for stamp, _ in asked} - bad
    ce = await db.get_ce("ce")
    assert ce["circuits"][CECall.SUBMIT]["failures"] == 0, "it works"
    assert ce["last_error"] == "no more of you"
    # A refusal is told once; nothing is left of it.
    assert [await submit(db, stamp, vo) for stamp, vo in asked if stamp in bad] == [None] * 4
    assert sum(map(len, (await logic.request_pilots(db, "lhcb", vos=["lhcb"])).values())) == 4


async def test_a_call_that_fails_is_one_failure_and_not_repeated_by_those_behind_it(
    db: MyPilotDB, site: Site, scripted: Any
) -> None:
    asked = await requested(db, 6)

    def broken(_: object) -> Any:
        raise ConnectionError("connection reset by peer")

    site.answer = broken
    for stamp, vo in asked:
        outcome = await submit(db, stamp, vo)
        assert isinstance(outcome, CERefusedError)
        assert "connection reset by peer; the next checks will find out" in str(outcome)
    assert len(site.calls) == 1
    assert (await db.get_ce("ce"))["circuits"][CECall.SUBMIT]["failures"] == 1
    assert await stamps_held(db) == {stamp for stamp, _ in asked}, "nobody knows: they keep their slots"
    scripted.observations["ce"] = Observation(Observed.WAITING, reference="job.1")
    for vo in VOS:
        await logic.transition_pilot_states(db, vo)
    found = [await submit(db, stamp, vo) for stamp, vo in asked]
    assert all(isinstance(each, int) for each in found)
    assert [(await db.get_pilot(each))["last_error"] for each in found] == [None] * 6


async def test_a_quota_is_no_failure_and_ends_the_requests_beyond_it(db: MyPilotDB, site: Site) -> None:
    asked = await requested(db, 6)
    site.answer = lambda pilots: {
        p.stamp: SubmitOutcome(f"job.{p.stamp}") if at < 2 else SubmitOutcome(error="QOSMaxSubmitJob", quota=True)
        for at, p in enumerate(pilots)
    }
    outcomes = [await submit(db, stamp, vo) for stamp, vo in asked]
    assert [type(outcome) for outcome in outcomes if not isinstance(outcome, int)] == [CEQuotaError] * 4
    assert len(site.calls) == 1
    ce = await db.get_ce("ce")
    assert (ce["quota"], ce["circuits"][CECall.SUBMIT]["failures"]) == (2, 0)
    assert len(await stamps_held(db)) == 2
    # After a pause, no more than the quota may have grown to, whatever waits.
    later = [(stamp, "lhcb") for stamp in await db.add_requests("ce", vo="lhcb", count=4)]
    with clock.simulated(lambda: datetime.now(UTC) + timedelta(seconds=61)):
        await submit(db, *later[0])
    assert [len(call) for call in site.calls] == [6, 1]


async def test_an_answer_that_leaves_one_out_says_nothing_about_that_one(db: MyPilotDB, site: Site) -> None:
    asked = await requested(db, 3)
    site.answer = lambda pilots: {p.stamp: SubmitOutcome("job") for p in pilots if p.stamp != asked[1][0]}
    outcomes = [await submit(db, stamp, vo) for stamp, vo in asked]
    assert [type(each) for each in outcomes] == [int, CERefusedError, int]
    assert "the next checks will find out" in str(outcomes[1])
    assert await stamps_held(db) == {stamp for stamp, _ in asked}


async def test_tasks_of_other_processes_find_their_outcomes_in_the_database(db: MyPilotDB, site: Site) -> None:
    asked = await requested(db, 5)
    bad = asked[1][0]
    site.answer = lambda pilots: {
        p.stamp: SubmitOutcome(error="no") if p.stamp == bad else SubmitOutcome(f"job.{p.stamp}") for p in pilots
    }
    first = await submit(db, *asked[0])
    requested_module._outcomes.clear()  # as in another process
    outcomes = [first, *[await submit(db, stamp, vo) for stamp, vo in asked[1:]]]
    assert [type(outcome) for outcome in outcomes] == [int, CERefusedError, int, int, int]
    assert len(site.calls) == 1
    assert await db.find_submission(bad) is None, "a refusal is told once"


async def test_what_a_dead_worker_has_begun_is_taken_up_by_its_stamps(db: MyPilotDB, site: Site) -> None:
    asked = await requested(db, 4)
    answer = site.answer

    def die(_: object) -> Any:
        raise asyncio.CancelledError

    site.answer = die
    with pytest.raises(asyncio.CancelledError):
        await submit(db, *asked[0])
    site.answer = answer
    again = [await submit(db, stamp, vo) for stamp, vo in asked]
    assert len(set(again)) == 4
    assert await stamps_held(db) == {stamp for stamp, _ in asked}
    assert all(pilot.maybe_submitted for call in site.calls[1:] for pilot in call)


async def test_what_has_become_too_many_is_refused_one_by_one(db: MyPilotDB, site: Site) -> None:
    asked = await requested(db, 6)
    await db.set_ce("ce", capacity=2, success_rate=1.0)
    outcomes = [await submit(db, stamp, vo) for stamp, vo in asked]
    assert [each for each in outcomes if isinstance(each, int)] == outcomes[:2]
    assert outcomes[2:] == [None] * 4
    assert len(await stamps_held(db)) == 2
    [late] = await db.add_requests("ce", vo="lhcb", count=1)
    assert isinstance(await submit(db, late, "lhcb"), NoRoomError)


async def test_a_probe_is_a_single_pilot(db: MyPilotDB, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = await requested(db, 4, rules={"breaker_failures": 1, "breaker_pause_seconds": 0.001})
    site.answer = lambda pilots: {p.stamp: SubmitOutcome(error="no") for p in pilots}
    assert isinstance(await submit(db, *asked[0]), CERefusedError)
    new = [(stamp, "lhcb") for stamp in await db.add_requests("ce", vo="lhcb", count=3)]
    await asyncio.sleep(0.01)  # the pause
    outcome = await submit(db, *new[0])
    assert isinstance(outcome, CERefusedError | CEPausedError)
    assert [len(call) for call in site.calls] == [4, 1]


async def test_a_vo_that_is_not_served_any_more_holds_up_no_other(db: MyPilotDB, site: Site) -> None:
    await db.add_ce("ce", 4, 1.0, backend="scripted", vos=["dteam"])
    asked = [(stamp, vo) for vo in VOS for stamp in await db.add_requests("ce", vo=vo, count=2)]
    outcomes = {stamp: await submit(db, stamp, vo) for stamp, vo in sorted(asked, key=lambda each: each[1])}
    for stamp, vo in asked:
        assert isinstance(outcomes[stamp], int if vo == "dteam" else PilotSubmissionError)
    assert {pilot.vo for call in site.calls for pilot in call} == {"dteam"}
    assert await db.waiting_requests("ce", at_most=9) == []


async def test_however_many_lead_at_once_each_pilot_is_submitted_once(db: MyPilotDB, site: Site) -> None:
    """Without the mutex, as when its holder was cut off."""
    asked = await requested(db, 20, rules={"max_batch": 3})
    outcomes = await asyncio.gather(*(submit(db, stamp, vo) for stamp, vo in asked))
    assert await stamps_held(db) == {stamp for stamp, _ in asked}
    assert len({each for each in outcomes if isinstance(each, int)}) <= 20
    new = [pilot.stamp for call in site.calls for pilot in call if not pilot.maybe_submitted]
    assert sorted(new) == sorted(stamp for stamp, _ in asked)
