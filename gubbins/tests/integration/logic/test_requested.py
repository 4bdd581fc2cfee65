"""Batches of requested pilots."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from gubbins.ces import NothingDoneError, Observation, Observed, PilotAtCE, SubmitOutcome
from gubbins.ces.transports.shell import LocalShell
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
Response = Callable[[Sequence[PilotAtCE]], Mapping[str, SubmitOutcome]]


class Site:
    """The compute element, and the pilots of each call."""

    def __init__(self) -> None:
        self.calls: list[list[PilotAtCE]] = []
        self.response: Response = lambda pilots: {p.stamp: SubmitOutcome(f"job.{p.stamp}") for p in pilots}


@pytest.fixture
def site(scripted: Any, monkeypatch: pytest.MonkeyPatch) -> Site:
    its = Site()

    async def submit(self: Any, pilots: Sequence[PilotAtCE]) -> Any:
        its.calls.append(list(pilots))
        return its.response(pilots)

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


async def test_the_first_task_submits_all_requests_and_the_others_return_their_outcomes(
    db: MyPilotDB, site: Site
) -> None:
    requests = await requested(db, 100)
    statements = 0

    def count(*_: object) -> None:
        nonlocal statements
        statements += 1

    event.listen(db.engine.sync_engine, "before_cursor_execute", count)
    pilots = [await submit(db, stamp, vo) for stamp, vo in requests]
    assert statements < len(requests) / 2, "the other tasks read nothing"
    assert [sorted(pilot.stamp for pilot in call) for call in site.calls] == [
        sorted(stamp for stamp, _ in requests)
    ]
    assert {(pilot.stamp, pilot.vo) for pilot in site.calls[0]} == set(requests)
    assert not any(pilot.maybe_submitted for pilot in site.calls[0])
    assert len(set(pilots)) == len(requests) == 100
    for (stamp, vo), pilot_id in zip(requests, pilots, strict=True):
        pilot = await db.get_pilot(pilot_id)
        assert (pilot["stamp"], pilot["vo"], pilot["reference"]) == (stamp, vo, f"job.{stamp}")
        assert [step["status"] for step in pilot["history"]] == [MyPilotStatus.SUBMITTED]
    assert await db.waiting_requests("ce", at_most=9) == []


@pytest.mark.parametrize("max_batch", [1, 4, 100])
async def test_a_call_has_at_most_max_batch_pilots_including_the_own_one(
    db: MyPilotDB, site: Site, max_batch: int
) -> None:
    requests = await requested(db, 10, rules={"max_batch": max_batch})
    for stamp, vo in reversed(requests):
        assert isinstance(await submit(db, stamp, vo), int)
    assert [len(call) for call in site.calls] == {1: [1] * 10, 4: [4, 4, 2], 100: [10]}[max_batch]
    assert await stamps_held(db) == {stamp for stamp, _ in requests}


async def test_a_partial_refusal_concerns_only_the_refused_pilots(db: MyPilotDB, site: Site) -> None:
    requests = await requested(db, 8)
    bad = {stamp for stamp, _ in requests[::2]}
    site.response = lambda pilots: {
        p.stamp: SubmitOutcome(error="no more of you") if p.stamp in bad else SubmitOutcome(f"job.{p.stamp}")
        for p in pilots
    }
    for stamp, vo in requests:
        outcome = await submit(db, stamp, vo)
        assert isinstance(outcome, CERefusedError if stamp in bad else int)
        assert stamp not in bad or "no more of you" in str(outcome)
    assert len(site.calls) == 1
    assert await stamps_held(db) == {stamp for stamp, _ in requests} - bad
    ce = await db.get_ce("ce")
    assert ce["circuits"][CECall.SUBMIT]["failures"] == 0, "it works"
    assert ce["last_error"] == "no more of you"
    # A refusal is reported once; nothing is left of it.
    assert [await submit(db, stamp, vo) for stamp, vo in requests if stamp in bad] == [None] * 4
    assert sum(map(len, (await logic.request_pilots(db, "lhcb", vos=["lhcb"])).values())) == 4


async def test_a_failed_call_is_one_failure_and_is_not_repeated_by_the_other_tasks(
    db: MyPilotDB, site: Site, scripted: Any
) -> None:
    requests = await requested(db, 6)

    def broken(_: object) -> Any:
        raise ConnectionError("connection reset by peer")

    site.response = broken
    for stamp, vo in requests:
        outcome = await submit(db, stamp, vo)
        assert isinstance(outcome, CERefusedError)
        assert "connection reset by peer; the next checks will find out" in str(outcome)
    assert len(site.calls) == 1
    assert (await db.get_ce("ce"))["circuits"][CECall.SUBMIT]["failures"] == 1
    assert await stamps_held(db) == {stamp for stamp, _ in requests}, (
        "the outcome is unknown: they keep their slots"
    )
    scripted.observations["ce"] = Observation(Observed.WAITING, reference="job.1")
    for vo in VOS:
        await logic.transition_pilot_states(db, vo)
    found = [await submit(db, stamp, vo) for stamp, vo in requests]
    assert all(isinstance(each, int) for each in found)
    assert [(await db.get_pilot(each))["last_error"] for each in found] == [None] * 6


async def test_a_quota_is_not_a_failure_and_refuses_the_pilots_beyond_it(db: MyPilotDB, site: Site) -> None:
    requests = await requested(db, 6)
    site.response = lambda pilots: {
        p.stamp: SubmitOutcome(f"job.{p.stamp}") if at < 2 else SubmitOutcome(error="QOSMaxSubmitJob", quota=True)
        for at, p in enumerate(pilots)
    }
    own = await submit(db, *requests[-1])
    assert isinstance(own, CEQuotaError)
    outcomes = [await submit(db, stamp, vo) for stamp, vo in requests]
    assert [type(outcome) for outcome in outcomes] == [int] * 2 + [type(None)] * 4
    assert len(site.calls) == 1
    ce = await db.get_ce("ce")
    assert (ce["quota"], ce["circuits"][CECall.SUBMIT]["failures"]) == (2, 0)
    assert len(await stamps_held(db)) == 2
    # After a pause, no more than the quota may have grown to, whatever waits.
    later = [(stamp, "lhcb") for stamp in (await db.add_requests("lhcb", {"ce": 4}))["ce"]]
    with clock.simulated(lambda: datetime.now(UTC) + timedelta(seconds=61)):
        await submit(db, *later[0])
    assert [len(call) for call in site.calls] == [6, 1]


async def test_a_response_without_an_outcome_of_a_pilot_leaves_its_state_unknown(
    db: MyPilotDB, site: Site
) -> None:
    requests = await requested(db, 3)
    site.response = lambda pilots: {p.stamp: SubmitOutcome("job") for p in pilots if p.stamp != requests[1][0]}
    outcomes = [await submit(db, stamp, vo) for stamp, vo in requests]
    assert [type(each) for each in outcomes] == [int, CERefusedError, int]
    assert "the next checks will find out" in str(outcomes[1])
    assert await stamps_held(db) == {stamp for stamp, _ in requests}


@pytest.mark.parametrize("silent", [True, False])
async def test_outcomes_known_before_an_error_or_the_time_limit_are_kept(
    db: MyPilotDB, scripted: Any, monkeypatch: pytest.MonkeyPatch, silent: bool
) -> None:
    async def submit_all(self: Any, pilots: Sequence[PilotAtCE]) -> Any:
        async def submit_one(part: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome]:
            (pilot,) = part
            if pilot.stamp == requests[0][0]:
                if silent:
                    await asyncio.Event().wait()
                raise ConnectionError("connection reset by peer")
            return {pilot.stamp: SubmitOutcome(f"job.{pilot.stamp}")}

        return await self.gather_outcomes(submit_one, [[pilot] for pilot in pilots], at_once=2)

    monkeypatch.setattr(scripted, "submit", submit_all)
    requests = await requested(db, 6, rules={"timeout_seconds": 0.5})
    outcomes = [await submit(db, stamp, vo) for stamp, vo in requests]
    assert [type(each) for each in outcomes] == [CERefusedError, *[int] * 5]
    reason = "no response within 0.5 s" if silent else "connection reset by peer"
    assert f"{reason}; the next checks will find out" in str(outcomes[0])
    ce = await db.get_ce("ce")
    assert ce["circuits"][CECall.SUBMIT]["failures"] == 0
    assert reason in ce["last_error"]


@pytest.mark.parametrize("responds", [True, False])
async def test_only_a_part_that_certainly_had_no_effect_is_refused(
    db: MyPilotDB, scripted: Any, monkeypatch: pytest.MonkeyPatch, responds: bool
) -> None:
    async def submit_all(self: Any, pilots: Sequence[PilotAtCE]) -> Any:
        async def submit_one(part: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome]:
            (pilot,) = part
            if pilot.stamp == requests[0][0]:
                raise ConnectionError("connection reset by peer")
            if pilot.stamp == requests[1][0] and responds:
                return {pilot.stamp: SubmitOutcome("job")}
            raise NothingDoneError("connection refused")

        return await self.gather_outcomes(submit_one, [[pilot] for pilot in pilots])

    monkeypatch.setattr(scripted, "submit", submit_all)
    requests = await requested(db, 6)
    for stamp, vo in requests:
        await submit(db, stamp, vo)
    assert await stamps_held(db) == {stamp for stamp, _ in requests[: 1 + responds]}


async def test_an_error_of_one_command_says_nothing_about_those_before_it(
    db: MyPilotDB, scripted: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def submit_one_by_one(self: Any, pilots: Sequence[PilotAtCE]) -> Any:
        shell = LocalShell()
        for pilot, command in zip(pilots, ["true", str(tmp_path / "absent")], strict=True):
            await shell.run([command, pilot.stamp], timeout=10)

    monkeypatch.setattr(scripted, "submit", submit_one_by_one)
    requests = await requested(db, 2)
    outcomes = [await submit(db, stamp, vo) for stamp, vo in requests]
    assert all("the next checks will find out" in str(outcome) for outcome in outcomes)
    assert await stamps_held(db) == {stamp for stamp, _ in requests}


async def test_tasks_of_other_processes_find_their_outcomes_in_the_database(db: MyPilotDB, site: Site) -> None:
    requests = await requested(db, 5)
    bad = requests[1][0]
    site.response = lambda pilots: {
        p.stamp: SubmitOutcome(error="no") if p.stamp == bad else SubmitOutcome(f"job.{p.stamp}") for p in pilots
    }
    first = await submit(db, *requests[0])
    requested_module._submitted.clear()  # as in another process
    outcomes = [first, *[await submit(db, stamp, vo) for stamp, vo in requests[1:]]]
    assert [type(outcome) for outcome in outcomes] == [int, CERefusedError, int, int, int]
    assert len(site.calls) == 1
    assert await db.find_submission(bad) is None, "a refusal is reported once"


async def test_submissions_of_a_dead_worker_are_resumed_by_their_stamps(db: MyPilotDB, site: Site) -> None:
    requests = await requested(db, 4)
    response = site.response

    def die(_: object) -> Any:
        raise asyncio.CancelledError

    site.response = die
    with pytest.raises(asyncio.CancelledError):
        await submit(db, *requests[0])
    site.response = response
    again = [await submit(db, stamp, vo) for stamp, vo in requests]
    assert len(set(again)) == 4
    assert await stamps_held(db) == {stamp for stamp, _ in requests}
    assert all(pilot.maybe_submitted for call in site.calls[1:] for pilot in call)


async def test_requests_beyond_the_limits_are_refused_one_by_one(db: MyPilotDB, site: Site) -> None:
    requests = await requested(db, 6)
    await db.set_ce("ce", capacity=2, success_rate=1.0)
    outcomes = [await submit(db, stamp, vo) for stamp, vo in requests]
    assert [each for each in outcomes if isinstance(each, int)] == outcomes[:2]
    assert outcomes[2:] == [None] * 4
    assert len(await stamps_held(db)) == 2
    [late] = (await db.add_requests("lhcb", {"ce": 1}))["ce"]
    assert isinstance(await submit(db, late, "lhcb"), NoRoomError)


async def test_a_probe_is_a_single_pilot(db: MyPilotDB, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = await requested(db, 4, rules={"breaker_failures": 1, "breaker_pause_seconds": 0.001})
    site.response = lambda pilots: {p.stamp: SubmitOutcome(error="no") for p in pilots}
    assert isinstance(await submit(db, *requests[0]), CERefusedError)
    new = [(stamp, "lhcb") for stamp in (await db.add_requests("lhcb", {"ce": 3}))["ce"]]
    await asyncio.sleep(0.01)  # the pause
    outcome = await submit(db, *new[0])
    assert isinstance(outcome, CERefusedError | CEPausedError)
    assert [len(call) for call in site.calls] == [4, 1]


async def test_requests_of_a_vo_that_is_not_served_do_not_delay_others(db: MyPilotDB, site: Site) -> None:
    await db.add_ce("ce", 4, 1.0, backend="scripted", vos=["dteam"])
    requests = [(stamp, vo) for vo in VOS for stamp in (await db.add_requests(vo, {"ce": 2}))["ce"]]
    outcomes = {stamp: await submit(db, stamp, vo) for stamp, vo in sorted(requests, key=lambda each: each[1])}
    for stamp, vo in requests:
        assert isinstance(outcomes[stamp], int if vo == "dteam" else PilotSubmissionError)
    assert {pilot.vo for call in site.calls for pilot in call} == {"dteam"}
    assert await db.waiting_requests("ce", at_most=9) == []


async def test_concurrent_batches_submit_each_pilot_once(db: MyPilotDB, site: Site) -> None:
    """Without the mutex, as when its holder was cut off."""
    requests = await requested(db, 20, rules={"max_batch": 3})
    outcomes = await asyncio.gather(*(submit(db, stamp, vo) for stamp, vo in requests))
    assert await stamps_held(db) == {stamp for stamp, _ in requests}
    assert len({each for each in outcomes if isinstance(each, int)}) <= 20
    new = [pilot.stamp for call in site.calls for pilot in call if not pilot.maybe_submitted]
    assert sorted(new) == sorted(stamp for stamp, _ in requests)
