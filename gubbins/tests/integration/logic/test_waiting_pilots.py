"""Waiting reasons, and cancellation of pilots that wait or run for too long."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from support.moving_clock import Clock

from gubbins.ces import Observation, Observed, SubmitOutcome
from gubbins.db.sql import MyPilotDB, MyPilotStatus
from gubbins.logic import my_pilots as logic

HELD = Observation(Observed.WAITING, "Slurm: JobHeldAdmin")


async def check(db: MyPilotDB, scripted: Any, seen: Observation) -> dict[str, Any]:
    scripted.observations["ce"] = seen
    await logic.transition_pilot_states(db, "lhcb")
    _, (pilot,) = await logic.search_pilots(db, vo="lhcb")
    return dict(pilot)


@pytest.fixture
async def submitted(db: MyPilotDB, scripted: Any, time: Clock) -> MyPilotDB:
    rules = {"max_waiting_hours": 72, "max_running_hours": 24}
    await db.add_ce("ce", 9, 1.0, backend="scripted", rules=rules)
    scripted.submissions["ce"] = SubmitOutcome(reference="job.1")
    await logic.submit_pilot(db, "ce", "lhcb")
    return db


async def test_the_waiting_reason_is_shown_until_the_pilot_starts(submitted: MyPilotDB, scripted: Any) -> None:
    db = submitted
    assert (await check(db, scripted, Observation(Observed.WAITING)))["waiting_reason"] is None
    assert (await check(db, scripted, HELD))["waiting_reason"] == "Slurm: JobHeldAdmin"
    assert (await logic.get_ce(db, "ce"))["waiting"] == {"Slurm: JobHeldAdmin": 1}
    assert "waiting" not in await logic.get_ce(db, "ce", "lhcb")
    assert (await check(db, scripted, Observation(Observed.WAITING, "Slurm: BeginTime")))["waiting_reason"] == (
        "Slurm: BeginTime"
    )
    assert (await check(db, scripted, Observation(Observed.WAITING)))["waiting_reason"] is None
    await check(db, scripted, HELD)
    started = await check(db, scripted, Observation(Observed.RUNNING))
    assert (started["status"], started["waiting_reason"]) == (MyPilotStatus.RUNNING, None)


async def test_a_pilot_waiting_for_too_long_is_cancelled_with_the_waiting_reason(
    submitted: MyPilotDB, scripted: Any, time: Clock
) -> None:
    db = submitted
    time.at += timedelta(hours=72)
    assert (await check(db, scripted, HELD))["cancel_requested_at"] is None
    time.at += timedelta(minutes=1)
    stale = await check(db, scripted, HELD)
    assert stale["cancel_requested_at"] is not None
    assert scripted.cancelled == []
    await check(db, scripted, HELD)
    assert scripted.cancelled == [stale["stamp"]]
    for _ in range(2):
        ended = await check(db, scripted, Observation(Observed.FAILED, "cancelled"))
    assert ended["status"] is MyPilotStatus.FAILED
    assert ended["last_error"] == "cancelled, for it waited longer than 72 h (Slurm: JobHeldAdmin)"


@pytest.mark.parametrize("state", [Observed.RUNNING, Observed.WAITING, Observed.NO_NEWS])
async def test_a_pilot_running_for_too_long_is_cancelled_with_this_reason(
    submitted: MyPilotDB, scripted: Any, time: Clock, state: Observed
) -> None:
    db = submitted
    time.at += timedelta(hours=71)
    await check(db, scripted, Observation(Observed.RUNNING))
    time.at += timedelta(hours=24)
    assert (await check(db, scripted, Observation(Observed.RUNNING)))["cancel_requested_at"] is None
    time.at += timedelta(minutes=1)
    assert (await check(db, scripted, Observation(state)))["cancel_requested_at"] is not None
    ended = await check(db, scripted, Observation(Observed.FAILED, "cancelled (exit code 143)"))
    assert ended["last_error"] == "cancelled, for it ran longer than 24 h"


async def test_a_started_pilot_that_is_held_shows_the_reason_and_is_cancelled(
    submitted: MyPilotDB, scripted: Any, time: Clock
) -> None:
    db = submitted
    await check(db, scripted, Observation(Observed.RUNNING))
    time.at += timedelta(hours=1)
    held = await check(db, scripted, HELD)
    assert (held["status"], held["waiting_reason"]) == (MyPilotStatus.RUNNING, "Slurm: JobHeldAdmin")
    assert (await logic.get_ce(db, "ce"))["waiting"] == {"Slurm: JobHeldAdmin": 1}
    assert (await check(db, scripted, Observation(Observed.RUNNING)))["waiting_reason"] is None
    assert (await logic.get_ce(db, "ce"))["waiting"] == {}
    time.at += timedelta(hours=23)
    assert (await check(db, scripted, HELD))["cancel_requested_at"] is None
    time.at += timedelta(minutes=1)
    assert (await check(db, scripted, HELD))["cancel_requested_at"] is not None
    ended = await check(db, scripted, Observation(Observed.FAILED, "removed"))
    assert (ended["status"], ended["waiting_reason"]) == (MyPilotStatus.FAILED, None)
    assert ended["last_error"] == "cancelled, for it ran longer than 24 h (Slurm: JobHeldAdmin)"


async def test_a_cancellation_by_a_user_keeps_its_reason(submitted: MyPilotDB, scripted: Any, time: Clock) -> None:
    db = submitted
    pilot = await check(db, scripted, Observation(Observed.RUNNING))
    await logic.cancel_pilot(db, pilot["pilot_id"], by="alice")
    time.at += timedelta(hours=100)
    await check(db, scripted, Observation(Observed.RUNNING))
    ended = await check(db, scripted, Observation(Observed.FAILED, "cancelled"))
    assert ended["last_error"] == "cancelled"
