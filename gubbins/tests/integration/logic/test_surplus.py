"""Cancellation of surplus pilots."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from support.moving_clock import Clock
from support.pilot_requests import request_pilots

from gubbins.db.sql import MyPilotDB
from gubbins.domain.matching import TaskQueue
from gubbins.domain.pilot_states import MyPilotStatus
from gubbins.logic import my_pilots as logic

LIMITED: dict[str, Any] = {"policy": "waiting_jobs", "max_surplus_seconds": 600, "trickle": 1}
SLOW = {"queue_seconds": 1e6}


async def ask(db: MyPilotDB, jobs: int | list[TaskQueue] | None, vo: str = "lhcb") -> dict[str, int]:
    async def waiting_jobs() -> int | list[TaskQueue] | None:
        return jobs

    return await request_pilots(db, vo, vos=["lhcb", "dteam"], waiting_jobs=waiting_jobs)


async def leaving(db: MyPilotDB, vo: str = "lhcb") -> list[int]:
    """Ids of the pilots that are to be cancelled, the oldest first."""
    waiting = await db.get_pilots_by_status(MyPilotStatus.SUBMITTED, vo)
    return [pilot["pilot_id"] for pilot in waiting if pilot["cancel_requested_at"] is not None]


async def submitted(db: MyPilotDB, time: Clock, count: int, ce_name: str = "ce") -> list[int]:
    ids = []
    for _ in range(count):
        ids.append(await logic.submit_pilot(db, ce_name, "lhcb"))
        time.at += timedelta(seconds=1)
    return ids


async def test_surplus_pilots_are_cancelled_oldest_first_after_the_time_of_the_rule(
    db: MyPilotDB, time: Clock
) -> None:
    await db.add_ce("ce", 20, 1.0, rules=LIMITED, settings=SLOW)
    assert await ask(db, 6) == {"ce": 6}
    ids = await submitted(db, time, 6)
    await db.delete_requests("ce", [stamp for stamp, _ in await db.waiting_requests("ce", at_most=99)])
    await ask(db, 3)
    time.at += timedelta(minutes=9)
    await ask(db, 3)
    assert await leaving(db) == []
    time.at += timedelta(minutes=2)
    await ask(db, 3)
    # Three have jobs, and one stays as the trickle would have it.
    assert await leaving(db) == ids[:2]
    pilot = await logic.get_pilot(db, ids[0])
    assert pilot["last_error"].startswith("cancelled, for no job has waited for it since")
    await ask(db, 3)
    assert await leaving(db) == ids[:2], "those that leave are no surplus of their own"
    await logic.transition_pilot_states(db, "lhcb")
    time.at += timedelta(minutes=1)
    await logic.transition_pilot_states(db, "lhcb")
    ended = await logic.get_pilot(db, ids[0])
    assert (ended["status"], ended["history"][-1]["reason"]) == (MyPilotStatus.FAILED, pilot["last_error"])


async def test_returning_demand_prevents_the_cancellation(db: MyPilotDB, time: Clock) -> None:
    await db.add_ce("ce", 20, 1.0, rules=LIMITED, settings=SLOW)
    await ask(db, 0)  # its demand is known from now on
    await db.delete_requests("ce", [stamp for stamp, _ in await db.waiting_requests("ce", at_most=99)])
    await submitted(db, time, 5)
    for _ in range(3):
        await ask(db, 0)
        time.at += timedelta(minutes=9)
        await ask(db, 5)
        time.at += timedelta(minutes=9)
    assert await leaving(db) == []


@pytest.mark.parametrize(
    ("rules", "jobs"),
    [
        (LIMITED | {"policy": "fill"}, 0),
        ({"policy": "waiting_jobs"}, 0),
        (LIMITED, None),
        (LIMITED | {"vos": {"lhcb": {"policy": "fill"}}}, 0),
    ],
    ids=["filled", "no such rule", "jobs not known", "filled by this VO"],
)
async def test_nothing_is_cancelled_without_the_rule_or_without_known_demand(
    sqlite_db: MyPilotDB, time: Clock, rules: dict[str, Any], jobs: int | None
) -> None:
    db = sqlite_db
    await db.add_ce("ce", 20, 1.0, rules=rules, settings=SLOW)
    await ask(db, jobs)
    await submitted(db, time, 5)
    for _ in range(4):
        await ask(db, jobs)
        time.at += timedelta(minutes=30)
    assert await leaving(db) == []


@pytest.mark.parametrize("rounds_before", [0, 1])
async def test_surplus_pilots_of_the_vo_are_cancelled_at_full_and_closed_sites_too(
    db: MyPilotDB, time: Clock, rounds_before: int
) -> None:
    await db.add_ce("ce", 20, 1.0, rules=LIMITED, settings=SLOW)
    for _ in range(rounds_before):
        await ask(db, 0)
        await ask(db, 0, "dteam")
    ids = await submitted(db, time, 3)
    other = await logic.submit_pilot(db, "ce", "dteam")
    await db.record_quota("ce")
    await db.set_ce_enabled("ce", False)
    await ask(db, 0)
    time.at += timedelta(minutes=15)
    await ask(db, 0)
    assert await leaving(db) == ids[:2]
    assert (await logic.get_pilot(db, other))["cancel_requested_at"] is None


async def test_pilots_that_the_waiting_jobs_cannot_use_are_surplus(sqlite_db: MyPilotDB, time: Clock) -> None:
    """Jobs for GPUs wait, and the pilots without one find no work."""
    db = sqlite_db
    await db.add_ce("cpu", 20, 1.0, rules=LIMITED | {"trickle": 0}, settings=SLOW)
    await db.add_ce("gpu", 20, 1.0, rules=LIMITED | {"tags": ["GPU"]}, settings=SLOW)
    await ask(db, 3)
    ids = await submitted(db, time, 2, "cpu")
    gpu_jobs = [TaskQueue(50, tags=frozenset({"GPU"}))]
    await ask(db, gpu_jobs)
    time.at += timedelta(minutes=20)
    await ask(db, gpu_jobs)
    assert await leaving(db) == ids
