"""Demand by matching of waiting jobs, from DiracX's database of task queues."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from diracx.db.sql import TaskQueueDB
from diracx.db.sql.task_queue import schema
from sqlalchemy import insert
from support.databases import with_tables
from support.pilot_requests import request_pilots

from gubbins.db.sql import MyPilotDB
from gubbins.domain.matching import TaskQueue
from gubbins.logic import my_pilots as logic
from gubbins.logic.my_pilots import waiting_jobs
from gubbins.tasks.my_pilots import MySubmitPilotsTask

JOBS: dict[str, Any] = {"policy": "waiting_jobs", "trickle": 0}
TABLES = {
    "sites": schema.SitesQueue,
    "banned_sites": schema.BannedSitesQueue,
    "grid_ces": schema.GridCEsQueue,
    "platforms": schema.PlatformsQueue,
    "job_types": schema.JobTypesQueue,
    "tags": schema.TagsQueue,
}


@pytest.fixture(params=["sqlite", "mariadb"])
async def task_queue_db(
    request: pytest.FixtureRequest, empty_database: Callable[[str], Awaitable[str]]
) -> AsyncIterator[TaskQueueDB]:
    """DiracX's own database with its tables, on each supported kind of server."""
    database = TaskQueueDB(await empty_database(request.param))
    async with with_tables(database):
        yield database


async def add_queue(
    db: TaskQueueDB,
    number: int,
    *,
    jobs: int,
    vo: str = "lhcb",
    enabled: bool = True,
    cpu: int = 0,
    **required: Any,
) -> None:
    async with db:
        row = {"TQId": number, "Owner": "user", "OwnerGroup": f"{vo}_user", "VO": vo, "CPUTime": cpu}
        await db.conn.execute(insert(schema.TaskQueues), [{**row, "Priority": 1.0, "Enabled": enabled}])
        ids = [
            {"TQId": number, "JobId": 1000 * number + job, "Priority": 1, "RealPriority": 1.0}
            for job in range(jobs)
        ]
        if ids:
            await db.conn.execute(insert(schema.JobsQueue), ids)
        for field, values in required.items():
            await db.conn.execute(insert(TABLES[field]), [{"TQId": number, "Value": value} for value in values])


async def ask(db: MyPilotDB, task_queue_db: TaskQueueDB, vo: str = "lhcb") -> dict[str, int]:
    return await request_pilots(
        db, vo, vos=["lhcb", "dteam"], waiting_jobs=lambda: logic.read_task_queues(task_queue_db, vo)
    )


async def test_task_queues_are_read_with_all_requirements(task_queue_db: TaskQueueDB) -> None:
    await add_queue(task_queue_db, 1, jobs=5, cpu=86_400)
    required = {
        "sites": ["LCG.CERN.ch", "LCG.PIC.es"],
        "banned_sites": ["LCG.RAL.uk"],
        "grid_ces": ["ce01.cern.ch"],
        "platforms": ["x86_64-el9"],
        "job_types": ["User"],
        "tags": ["GPU", "8Processors"],
    }
    await add_queue(task_queue_db, 2, jobs=7, **required)
    await add_queue(task_queue_db, 3, jobs=9, vo="dteam")
    await add_queue(task_queue_db, 4, jobs=9, enabled=False)
    await add_queue(task_queue_db, 5, jobs=0, tags=["GPU"])
    found = await logic.read_task_queues(task_queue_db, "lhcb")
    expected = TaskQueue(7, 0, **{field: frozenset(values) for field, values in required.items()})
    assert found == [expected, TaskQueue(5, 86_400)]
    assert await logic.read_task_queues(task_queue_db, "gridpp") == []


async def test_a_task_queue_for_any_site_has_no_requirement(task_queue_db: TaskQueueDB) -> None:
    await add_queue(task_queue_db, 1, jobs=5, sites=["ANY"], platforms=["Any"], job_types=["any"])
    assert await logic.read_task_queues(task_queue_db, "lhcb") == [TaskQueue(5)]


async def test_of_too_many_task_queues_those_with_most_jobs_are_used(
    task_queue_db: TaskQueueDB, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waiting_jobs, "MAX_TASK_QUEUES", 2)
    for number in range(1, 5):
        await add_queue(task_queue_db, number, jobs=number)
    assert await logic.read_task_queues(task_queue_db, "lhcb") == [TaskQueue(4), TaskQueue(3)]
    assert "lhcb has more than 2 task queues" in caplog.text


async def test_gpu_jobs_do_not_request_cpu_pilots(db: MyPilotDB, task_queue_db: TaskQueueDB) -> None:
    await db.add_ce("cpu", 50, 1.0, rules=JOBS)
    await db.add_ce("gpu", 50, 1.0, rules=JOBS | {"required_tags": ["GPU"]})
    await add_queue(task_queue_db, 1, jobs=7, tags=["GPU"])
    assert await ask(db, task_queue_db) == {"gpu": 7}
    await add_queue(task_queue_db, 2, jobs=5)
    assert await ask(db, task_queue_db) == {"cpu": 5}
    assert await ask(db, task_queue_db) == {}
    # What another VO's jobs require is its own affair.
    await add_queue(task_queue_db, 3, jobs=2, vo="dteam", tags=["GPU"])
    assert await ask(db, task_queue_db) == {}
    assert await ask(db, task_queue_db, "dteam") == {"gpu": 2}


async def test_compute_elements_that_serve_the_same_queue_share_its_jobs(
    db: MyPilotDB, task_queue_db: TaskQueueDB
) -> None:
    for name, capacity, site in [("a", 20, "LCG.CERN.ch"), ("b", 10, "LCG.PIC.es"), ("c", 10, "LCG.RAL.uk")]:
        await db.add_ce(name, capacity, 1.0, rules=JOBS | {"site": site})
    await add_queue(task_queue_db, 1, jobs=12, sites=["LCG.CERN.ch", "LCG.PIC.es"])
    await add_queue(task_queue_db, 2, jobs=3, sites=["LCG.RAL.uk", "LCG.PIC.es"], banned_sites=["LCG.PIC.es"])
    assert await ask(db, task_queue_db) == {"a": 8, "b": 4, "c": 3}
    assert await ask(db, task_queue_db) == {}, "they are on their way"


async def test_a_waiting_pilot_is_counted_only_for_jobs_that_it_can_run(
    db: MyPilotDB, task_queue_db: TaskQueueDB
) -> None:
    await db.add_ce("cpu", 50, 1.0, rules=JOBS | {"trickle": 2})
    await db.add_ce("gpu", 50, 1.0, rules=JOBS | {"tags": ["GPU"]})
    assert await ask(db, task_queue_db) == {"cpu": 2}
    await add_queue(task_queue_db, 1, jobs=3, tags=["GPU"])
    assert await ask(db, task_queue_db) == {"gpu": 3}
    # The two at `cpu` take two of these, so that no pilot of `gpu` is to be left for them.
    await add_queue(task_queue_db, 2, jobs=2)
    assert await ask(db, task_queue_db) == {}
    await add_queue(task_queue_db, 3, jobs=2, cpu=100)
    assert sum((await ask(db, task_queue_db)).values()) == 2


async def test_the_task_reads_task_queues_if_that_database_is_configured(
    db: MyPilotDB, task_queue_db: TaskQueueDB
) -> None:
    await db.add_ce("cpu", 50, 1.0, rules=JOBS)
    await db.add_ce("big", 50, 1.0, rules=JOBS | {"processors": 8})
    await add_queue(task_queue_db, 1, jobs=4, tags=["8Processors"])
    with pytest.raises(RuntimeError, match="broker"):  # none is bound here; the demand is what counts
        await MySubmitPilotsTask("lhcb").execute(my_pilot_db=db, task_queue_db=task_queue_db)
    wanted = {name: demand.granted_at is not None for (name, _), demand in (await db.get_demand()).items()}
    assert wanted == {"cpu": False, "big": True}


async def test_without_the_database_of_task_queues_only_trickle_pilots_are_requested(
    db: MyPilotDB, caplog: pytest.LogCaptureFixture
) -> None:
    await db.add_ce("ce", 20, 1.0, rules={"policy": "waiting_jobs"})
    broken = TaskQueueDB("sqlite+aiosqlite:////nonexistent/queues.db")
    async with broken.engine_context():
        assert await ask(db, broken) == {"ce": 1}
    assert "Cannot read the task queues of lhcb" in caplog.text
