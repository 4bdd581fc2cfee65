"""Waiting jobs of a VO, read from the databases of DiracX."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from gubbins.domain.matching import TaskQueue, unless_any
from gubbins.domain.text import one_line

if TYPE_CHECKING:
    from diracx.db.sql import JobDB, TaskQueueDB

logger = logging.getLogger(__name__)

JOB_DB_TIMEOUT_SECONDS = 30

MAX_TASK_QUEUES = 20_000
"""Task queues read per VO; of more, those with most jobs."""


async def count_waiting_jobs(job_db: JobDB | None, vo: str) -> int | None:
    """Count the VO's jobs in the state Waiting; None: there is no job database, or it does not respond.

    Opens a short transaction of `job_db`.
    """
    if job_db is None:
        logger.warning("Cannot count the waiting jobs of %s: DIRACX_DB_URL_JOBDB is not set", vo)
        return None
    from diracx.core.models import JobStatus, ScalarSearchOperator, ScalarSearchSpec

    equal = ScalarSearchOperator.EQUAL
    search = [
        ScalarSearchSpec(parameter="VO", operator=equal, value=vo),
        ScalarSearchSpec(parameter="Status", operator=equal, value=JobStatus.WAITING),
    ]
    try:
        async with asyncio.timeout(JOB_DB_TIMEOUT_SECONDS), job_db:
            counted = await job_db.summary(["VO"], list(search))
    except Exception as error:
        logger.warning("Cannot count the waiting jobs of %s: %s", vo, one_line(error))
        return None
    return sum(int(row["count"]) for row in counted)


async def read_task_queues(task_queue_db: TaskQueueDB, vo: str) -> list[TaskQueue] | None:
    """Read the VO's waiting jobs by their requirements, in 8 statements; None: the database does not respond.

    Opens a short transaction of `task_queue_db`.
    """
    from diracx.db.sql.task_queue import schema
    from sqlalchemy import func, select

    queues, jobs = schema.TaskQueues, schema.JobsQueue
    # `Enabled` is an integer in DIRAC.
    of_vo = select(queues.TQId).where(queues.VO.in_([vo]), queues.Enabled >= 1)
    number = func.count()
    counted = (
        select(queues.TQId, queues.CPUTime, number)
        .join(jobs, jobs.TQId == queues.TQId)
        .where(queues.TQId.in_(of_vo))
        .group_by(queues.TQId, queues.CPUTime)
        .order_by(number.desc(), queues.TQId)
        .limit(MAX_TASK_QUEUES + 1)
    )
    tables: dict[str, Any] = {
        "sites": schema.SitesQueue,
        "banned_sites": schema.BannedSitesQueue,
        "grid_ces": schema.GridCEsQueue,
        "platforms": schema.PlatformsQueue,
        "job_types": schema.JobTypesQueue,
        "tags": schema.TagsQueue,
    }
    required: dict[int, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    try:
        async with asyncio.timeout(JOB_DB_TIMEOUT_SECONDS), task_queue_db:
            rows: Any = (await task_queue_db.conn.execute(counted)).all()
            for field, table in tables.items():
                values = select(table.TQId, table.Value).where(table.TQId.in_(of_vo))
                for queue, value in await task_queue_db.conn.execute(values):
                    required[queue][field].add(value)
    except Exception as error:
        logger.warning("Cannot read the task queues of %s: %s", vo, one_line(error))
        return None
    if len(rows) > MAX_TASK_QUEUES:
        logger.warning("%s has more than %d task queues: the others are ignored", vo, MAX_TASK_QUEUES)
        rows = rows[:MAX_TASK_QUEUES]
    return [
        TaskQueue(jobs, cpu_seconds, **{field: unless_any(values) for field, values in required[queue].items()})
        for queue, cpu_seconds, jobs in rows
    ]
