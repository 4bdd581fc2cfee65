"""Demand of a VO for pilots by the rules of each compute element."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from diracx.db.sql import JobDB
from sqlalchemy import update
from support.databases import with_tables
from support.pilot_requests import request_pilots

from gubbins.db.sql import MyPilotDB
from gubbins.db.sql.schema import Pilots
from gubbins.domain import clock
from gubbins.domain.demand import MAX_REQUESTS
from gubbins.logic import my_pilots as logic
from gubbins.tasks.my_pilots import MySubmitPilotsTask

JOBS: dict[str, Any] = {"policy": "waiting_jobs"}


async def ask(
    db: MyPilotDB, jobs: int | None, vo: str = "lhcb", vos: tuple[str, ...] = ("lhcb",)
) -> dict[str, int]:
    async def waiting_jobs() -> int | None:
        return jobs

    return await request_pilots(db, vo, vos=vos, waiting_jobs=waiting_jobs)


async def test_no_more_pilots_are_requested_than_there_are_waiting_jobs(db: MyPilotDB) -> None:
    await db.add_ce("a", 20, 1.0, rules=JOBS)
    await db.add_ce("b", 10, 1.0, rules=JOBS)
    await db.add_ce("full", 5, 1.0)
    # The job database is not queried for a compute element that is filled anyway.
    assert await ask(db, 12) == {"a": 7, "b": 5, "full": 5}
    # They are on their way, 17 pilots for 12 jobs.
    assert await ask(db, 12) == {}
    assert await ask(db, 20) == {"a": 2, "b": 1}
    assert await ask(db, 1000) == {"a": 11, "b": 4}


async def test_a_round_is_a_constant_number_of_statements(db: MyPilotDB, count_statements: Any) -> None:
    await db.add_ce("a", 2, 1.0)
    with count_statements(db) as of_one:
        assert await ask(db, 0) == {"a": 2}
    names = [f"ce{number}" for number in range(12)]
    for name in names:
        await db.add_ce(name, 2, 1.0)
    with count_statements(db) as of_many:
        assert await ask(db, 0, vo="dteam", vos=("dteam",)) == dict.fromkeys(names, 2)
    assert len(of_many) == len(of_one)


async def test_waiting_pilots_reduce_the_demand(db: MyPilotDB) -> None:
    await db.add_ce("a", 50, 1.0, rules=JOBS)
    await db.add_ce("elsewhere", 50, 1.0, settings={"queue_seconds": 1e9})
    async with db:
        for _ in range(7):
            await db.submit_pilot("elsewhere", "lhcb")
        await db.conn.execute(update(Pilots).values(submitted_at=datetime(2020, 1, 1, tzinfo=UTC)))
    await db.set_ce_enabled("elsewhere", False)
    for _ in range(3):
        await logic.submit_pilot(db, "a", "lhcb")
    await db.submit_pilot("a", "dteam")
    assert await ask(db, 10) == {}
    assert await ask(db, 12) == {"a": 2}
    # What runs has its job already.
    await logic.transition_pilot_states(db, "lhcb")
    assert await ask(db, 12) == {"a": 3}
    # No job reaches a pilot at a banned one.
    await db.ban_ce("elsewhere", reason=None)
    assert await ask(db, 12) == {"a": 7}


async def test_a_ce_without_pilots_gets_trickle_pilots(db: MyPilotDB) -> None:
    await db.add_ce("one", 20, 1.0, rules=JOBS)
    await db.add_ce("two", 20, 1.0, rules=JOBS | {"trickle": 2})
    await db.add_ce("none", 20, 1.0, rules=JOBS | {"trickle": 0})
    assert await ask(db, 0) == {"one": 1, "two": 2}
    assert await ask(db, 0) == {}


@pytest.mark.parametrize("known", ["unreadable", "unasked"])
async def test_without_a_job_database_only_trickle_pilots_are_requested(db: MyPilotDB, known: str) -> None:
    await db.add_ce("a", 20, 1.0, rules=JOBS)
    if known == "unreadable":
        assert await ask(db, None) == {"a": 1}
    else:
        assert await request_pilots(db, "lhcb", vos=["lhcb"]) == {"a": 1}


async def test_a_huge_capacity_is_filled_in_several_rounds(sqlite_db: MyPilotDB) -> None:
    await sqlite_db.add_ce("a", 2**31 - 1, 1.0)
    vos = ("lhcb", "dteam")
    assert await ask(sqlite_db, None, "lhcb", vos) == {"a": MAX_REQUESTS}
    assert await ask(sqlite_db, None, "dteam", vos) == {}
    stamps = [stamp for stamp, _ in await sqlite_db.waiting_requests("a", at_most=30_000)]
    await logic.withdraw_requests(sqlite_db, "a", stamps)
    assert await ask(sqlite_db, None, "lhcb", vos) == {"a": 5_000}
    assert await ask(sqlite_db, None, "dteam", vos) == {"a": 25_000}


async def test_limits_hold_for_each_vo_at_each_ce(db: MyPilotDB) -> None:
    await db.add_ce(
        "ce", 40, 1.0, rules={"max_per_cycle": 4, "max_waiting": 6, "vos": {"dteam": {"max_waiting": 1}}}
    )
    assert await ask(db, None) == {"ce": 4}
    assert await ask(db, None) == {"ce": 2}
    assert await ask(db, None) == {}
    assert await ask(db, None, "dteam") == {"ce": 1}
    stamps = [stamp for stamp, vo in await db.waiting_requests("ce", at_most=99) if vo == "lhcb"]
    assert len(stamps) == 6
    await logic.withdraw_requests(db, "ce", stamps)
    for at in range(6):
        with clock.simulated(lambda at=at: datetime.now(UTC) - timedelta(minutes=10 - at)):
            await logic.submit_pilot(db, "ce", "lhcb")
    assert await ask(db, None) == {}
    await logic.transition_pilot_states(db, "lhcb")
    assert await ask(db, None) == {"ce": 4}


async def test_policy_and_share_can_differ_for_one_vo(db: MyPilotDB) -> None:
    vos = ("lhcb", "dteam")
    rules = {"vos": {"lhcb": {"share": 3}, "dteam": {"policy": "waiting_jobs", "trickle": 0}}}
    await db.add_ce("ce", 20, 1.0, rules=rules)
    assert await ask(db, 2, "dteam", vos) == {"ce": 2}
    assert await ask(db, None, "lhcb", vos) == {"ce": 18}
    await db.add_ce("new", 20, 1.0, rules={"vos": {"lhcb": {"share": 3}}})
    assert await ask(db, None, "lhcb", vos) == {"new": 15}
    assert await ask(db, None, "dteam", vos) == {"new": 5}


async def test_a_half_open_ce_gets_a_request_for_one_pilot(db: MyPilotDB, scripted: Any) -> None:
    await db.add_ce("ce", 9, 1.0, backend="scripted", rules={"breaker_failures": 1, "breaker_pause_seconds": 1e-6})
    scripted.submissions["ce"] = ConnectionError("gone")
    with pytest.raises(logic.PilotSubmissionError):
        await logic.submit_pilot(db, "ce", "lhcb")
    assert await ask(db, None) == {"ce": 1}
    assert await ask(db, None) == {}


@pytest.fixture
async def job_db() -> AsyncIterator[JobDB]:
    database = JobDB("sqlite+aiosqlite:///:memory:")
    async with with_tables(database):
        yield database


async def test_waiting_jobs_are_read_from_the_job_database_of_diracx(db: MyPilotDB, job_db: JobDB) -> None:
    async with job_db:
        for number, (vo, status) in enumerate(
            [("lhcb", "Waiting")] * 3 + [("lhcb", "Running"), ("lhcb", "Received"), ("dteam", "Waiting")]
        ):
            job_id = await job_db.create_job(f"job {number}")
            await job_db.insert_job_attributes({job_id: {"VO": vo, "Status": status}})
    await db.add_ce("a", 20, 1.0, rules=JOBS)
    assert await logic.count_waiting_jobs(job_db, "lhcb") == 3
    assert await logic.count_waiting_jobs(job_db, "gridpp") == 0
    task = MySubmitPilotsTask("lhcb")
    with pytest.raises(RuntimeError, match="broker"):  # none is bound here; the requests are what counts
        await task.execute(my_pilot_db=db, job_db=job_db)
    assert await ask(db, await logic.count_waiting_jobs(job_db, "lhcb")) == {"a": 3}


async def test_an_unavailable_job_database_is_like_none(caplog: pytest.LogCaptureFixture) -> None:
    broken = JobDB("sqlite+aiosqlite:////nonexistent/jobs.db")
    async with broken.engine_context():
        assert await logic.count_waiting_jobs(broken, "lhcb") is None
    assert "Cannot count the waiting jobs of lhcb" in caplog.text
    assert await logic.count_waiting_jobs(None, "lhcb") is None
