"""How many jobs of a VO wait for a pilot, as the job database of DiracX says."""

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
    """How many jobs of the VO are in the state Waiting; None: there is no job database, or it does not answer.

    `job_db` is not in a transaction; a short one is opened.
    """
    if job_db is None:
        logger.warning("Nobody knows how many jobs of %s wait: DIRACX_DB_URL_JOBDB is not set", vo)
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
