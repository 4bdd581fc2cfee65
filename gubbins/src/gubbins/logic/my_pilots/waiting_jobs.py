"""Count the jobs of a VO that wait for a pilot, in the job database of DiracX."""

from __future__ import annotations

__all__ = ["count_waiting_jobs"]

import asyncio
import logging
from typing import TYPE_CHECKING

from gubbins.domain.text import one_line

if TYPE_CHECKING:
    from diracx.db.sql import JobDB

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 30


async def count_waiting_jobs(job_db: JobDB | None, vo: str) -> int | None:
    """Count jobs of the VO in the state Waiting; None: there is no job database, or it does not respond.

    `job_db` is not in a transaction; a short one is opened.
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
        async with asyncio.timeout(TIMEOUT_SECONDS), job_db:
            counted = await job_db.summary(["VO"], list(search))
    except Exception as error:
        logger.warning("Cannot count the waiting jobs of %s: %s", vo, one_line(error))
        return None
    return sum(int(row["count"]) for row in counted)
