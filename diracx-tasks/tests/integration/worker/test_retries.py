"""Retries of failed tasks according to their policy, with the same id."""

from __future__ import annotations

from itertools import pairwise

import pytest
from diracx.tasks.plumbing import (
    BaseTask,
    ExponentialBackoff,
    StopRetryingError,
    TaskRetryRequestedError,
    UnretryableError,
)
from diracx.tasks.plumbing.broker.models import TaskMessage
from diracx.tasks.testing import TaskSystem
from support.standard_tasks import SEEN, Broken

pytestmark = pytest.mark.event_loops("asyncio", "uvloop")


# --- failures, retries, dead letters ---------------------------------------------------------------------


async def test_P31_the_first_delay_is_the_base_and_there_are_max_retries_retries(redis_url: str) -> None:
    async with TaskSystem([Broken], redis_url=redis_url, scheduler=True) as system:
        result = await system.result(await Broken().schedule())
        assert result.is_err
        assert result.error is not None
        assert result.error["type"] == "ValueError"
        gaps = [later - earlier for earlier, later in pairwise(SEEN)]
        assert len(SEEN) == 4, "once, and three retries"
        for gap, delay in zip(gaps, (0.02, 0.04, 0.08), strict=True):
            assert gap.total_seconds() >= delay
        assert system.task_db is not None
        async with system.task_db as db:
            [dead_letter] = await db.search()
        assert dead_letter["task_name"] == "test:Broken"
        assert dead_letter["reason"] == "exhausted"
        assert [attempt["message"] for attempt in dead_letter["attempts"]] == ["there is no such site"] * 4
        assert "execute" in dead_letter["attempts"][0]["traceback"]
        assert TaskMessage.loadb(dead_letter["message"]).task_name == "test:Broken"


@pytest.mark.parametrize("error", [UnretryableError("never"), StopRetryingError("enough")])
async def test_P30_stop_retrying_ends_retries_at_once(redis_url: str, error: Exception) -> None:
    class Stops(BaseTask):
        retry_policy = ExponentialBackoff(base_delay_seconds=0.01, max_retries=5)

        async def execute(self) -> None:
            SEEN.append(1)
            raise error

    async with TaskSystem([Stops], redis_url=redis_url) as system:
        result = await system.result(await Stops().schedule())
        assert result.error is not None
        assert result.error["type"] == type(error).__name__
        await system.drain()
        assert SEEN == [1]
        assert system.task_db is not None
        async with system.task_db as db:
            assert await db.search() == [], "not dlq_eligible: dropped"


async def test_P30_a_requested_retry_ignores_the_policy(redis_url: str) -> None:
    class Again(BaseTask):
        async def execute(self) -> int:
            SEEN.append(1)
            if len(SEEN) == 1:
                raise TaskRetryRequestedError("not yet")
            return len(SEEN)

    async with TaskSystem([Again], redis_url=redis_url, scheduler=True) as system:
        assert (await system.result(await Again().schedule())).return_value == 2


async def test_P14_a_retried_task_keeps_its_id_and_its_result_is_found_under_it(redis_url: str) -> None:
    class Second(BaseTask):
        retry_policy = ExponentialBackoff(base_delay_seconds=0.02, max_retries=1)

        async def execute(self) -> str:
            SEEN.append(1)
            if len(SEEN) == 1:
                raise ValueError("not yet")
            return "at last"

    async with TaskSystem([Second], redis_url=redis_url) as system:
        assert (await system.result(await Second().schedule())).return_value == "at last"
