"""Jobs of the demo: they are in DiracX's databases of jobs and task queues, and running pilots take them.

They stand for the matcher of DIRAC, which DiracX does not have yet: a pilot that runs gets the oldest job of its
VO that its compute element can serve, and the job ends with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from diracx.core.models import JobStatus
from diracx.db.sql import JobDB, PilotAgentsDB, TaskQueueDB
from diracx.db.sql.task_queue.schema import JobsQueue, TagsQueue, TaskQueues
from diracx.tasks.cli.runtime.supervisor import report_to_supervisor
from sqlalchemy import delete, insert, select

from gubbins.db.sql import MyPilotDB
from gubbins.domain.matching import TaskQueue, group_jobs
from gubbins.domain.pilot_states import MyPilotStatus
from gubbins.domain.rules import rules_of
from gubbins.logic import my_pilots as logic

from .site import VOS

JOBS_AT_FIRST = 120
"""Waiting jobs of each VO at the start of the demo."""

_TAGS: tuple[frozenset[str], ...] = (frozenset(), frozenset({"GPU"}))
"""Two task queues of each VO: for any compute element, and for GPUs."""
_GPU_SHARE = 0.15
_ARRIVING = 2
"""New jobs of each VO in each step, while fewer than at first are waiting."""
_STEP_SECONDS = 0.5


@contextlib.asynccontextmanager
async def open_databases() -> AsyncIterator[tuple[JobDB, TaskQueueDB, PilotAgentsDB]]:
    """The databases that the environment names."""
    job_db = JobDB(os.environ["DIRACX_DB_URL_JOBDB"])
    task_queue_db = TaskQueueDB(os.environ["DIRACX_DB_URL_TASKQUEUEDB"])
    registry = PilotAgentsDB(os.environ["DIRACX_DB_URL_PILOTAGENTSDB"])
    async with job_db.engine_context(), task_queue_db.engine_context(), registry.engine_context():
        yield job_db, task_queue_db, registry


async def fill() -> None:
    """Create the tables, and the first jobs of each VO."""
    async with open_databases() as databases:
        for database in databases:
            async with database.engine.begin() as connection:
                await connection.run_sync(database.metadata.create_all)
        job_db, task_queue_db, _ = databases
        async with task_queue_db:
            for number, (vo, tags) in enumerate(itertools.product(VOS, _TAGS), start=1):
                owner = {"Owner": "demo", "OwnerGroup": f"{vo}_user", "VO": vo, "CPUTime": 3600, "Priority": 1.0}
                await task_queue_db.conn.execute(
                    insert(TaskQueues).values({"TQId": number, "Enabled": True, **owner})
                )
                for tag in tags:
                    await task_queue_db.conn.execute(insert(TagsQueue).values({"TQId": number, "Value": tag}))
        for vo in VOS:
            await submit_jobs(job_db, task_queue_db, vo, JOBS_AT_FIRST)


async def submit_jobs(job_db: JobDB, task_queue_db: TaskQueueDB, vo: str, count: int) -> None:
    """Put new jobs of a VO into both databases."""
    attributes = {"VO": vo, "Status": JobStatus.WAITING, "Owner": "demo", "OwnerGroup": f"{vo}_user"}
    async with job_db:
        ids = [await job_db.create_job("") for _ in range(count)]
        await job_db.insert_job_attributes({id: {**attributes, "JobName": f"job {id}"} for id in ids})
    gpu = [random.random() < _GPU_SHARE for _ in ids]
    rows = [
        {"TQId": _queue(vo, _TAGS[wanted]), "JobId": id, "Priority": 1, "RealPriority": 1.0}
        for id, wanted in zip(ids, gpu, strict=True)
    ]
    async with task_queue_db:
        await task_queue_db.conn.execute(insert(JobsQueue), rows)


def _queue(vo: str, tags: frozenset[str]) -> int:
    return VOS.index(vo) * len(_TAGS) + _TAGS.index(tags) + 1


@dataclass
class Matcher:
    """Gives jobs to pilots that run."""

    pilots: MyPilotDB
    job_db: JobDB
    task_queue_db: TaskQueueDB
    registry: PilotAgentsDB
    running: dict[int, int | None] = field(default_factory=dict)
    """Pilots that run, with their jobs; None: there was none."""

    async def step(self) -> None:
        """Give jobs to pilots that have begun, and end those of pilots that have ended."""
        _, found = await logic.search_pilots(
            self.pilots, vo=None, status=MyPilotStatus.RUNNING, page=1, per_page=1000
        )
        ces = {ce["name"]: ce for ce in await logic.list_ces(self.pilots)}
        for pilot in found:
            if pilot["pilot_id"] not in self.running and pilot["registry_id"] is not None:
                self.running[pilot["pilot_id"]] = await self._give(pilot, ces[pilot["ce_name"]])
        active = {pilot["pilot_id"] for pilot in found}
        for pilot_id in [*self.running]:
            if pilot_id not in active:
                await self._end(pilot_id, self.running.pop(pilot_id))
        for vo in VOS:
            waiting = await logic.read_task_queues(self.task_queue_db, vo) or []
            if sum(queue.jobs for queue in waiting) < JOBS_AT_FIRST:
                await submit_jobs(self.job_db, self.task_queue_db, vo, _ARRIVING)

    async def _give(self, pilot: Any, ce: Any) -> int | None:
        vo = pilot["vo"]
        rules = {ce["name"]: rules_of(ce).of(vo)}
        able = [_queue(vo, tags) for tags in _TAGS if group_jobs([TaskQueue(1, tags=tags)], rules)]
        async with self.task_queue_db as db:
            oldest = select(JobsQueue.JobId).where(JobsQueue.TQId.in_(able)).order_by(JobsQueue.JobId).limit(1)
            job_id = (await db.conn.execute(oldest)).scalar_one_or_none()
            if job_id is None:
                return None
            await db.conn.execute(delete(JobsQueue).where(JobsQueue.JobId == job_id))
        await self._set_status([job_id], JobStatus.RUNNING)
        row = {"PilotID": pilot["registry_id"], "JobID": job_id, "StartTime": datetime.now(UTC)}
        async with self.registry as registry:
            await registry.assign_jobs_to_pilot([row])
        return int(job_id)

    async def _end(self, pilot_id: int, job_id: int | None) -> None:
        if job_id is not None:
            pilot = await logic.get_pilot(self.pilots, pilot_id)
            done = pilot["status"] is MyPilotStatus.DONE
            await self._set_status([job_id], JobStatus.DONE if done else JobStatus.FAILED)

    async def _set_status(self, job_ids: Sequence[int], status: JobStatus) -> None:
        changes = {job_id: {"Status": status} for job_id in job_ids}
        async with self.job_db as db:
            await db.set_job_attributes(changes)  # type: ignore[no-untyped-call]  # DiracX 0.7 does not say


async def run() -> None:
    """Match until SIGTERM or the end of the demo."""
    ready, stop = asyncio.Event(), asyncio.Event()
    pilots = MyPilotDB(os.environ["DIRACX_DB_URL_MYPILOTDB"])
    reporting = asyncio.create_task(report_to_supervisor(ready, stop.set))
    async with pilots.engine_context(), open_databases() as databases:
        matcher = Matcher(pilots, *databases)
        ready.set()
        while not stop.is_set():
            await matcher.step()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), _STEP_SECONDS)
    reporting.cancel()


if __name__ == "__main__":
    asyncio.run(run())
