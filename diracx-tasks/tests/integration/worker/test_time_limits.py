"""Time limits and cancellation, also of tasks that ignore them."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
from diracx.tasks.plumbing import (
    BaseTask,
    MutexLock,
    TimeLimitExceededError,
)
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from support.standard_tasks import SEEN, Echo
from support.waiting import until

pytestmark = pytest.mark.event_loops("asyncio", "uvloop")


async def test_time_limit_cancels_the_execution_and_counts_as_a_failure(redis_url: str) -> None:
    class Endless(BaseTask):
        time_limit_seconds = 0.05

        async def execute(self) -> None:
            await asyncio.Event().wait()

    async with TaskSystem([Endless], redis_url=redis_url) as system:
        result = await system.result(await Endless().schedule())
        assert result.error is not None
        assert result.error["type"] == TimeLimitExceededError.__name__
        assert "0.05 s" in result.error["message"]


async def test_a_task_that_swallows_its_time_limit_has_not_succeeded(redis_url: str) -> None:
    class Stubborn(BaseTask):
        time_limit_seconds = 0.05

        async def execute(self) -> str:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                return "fine"
            return "never"

    async with TaskSystem([Stubborn], redis_url=redis_url) as system:
        result = await system.result(await Stubborn().schedule())
        assert result.error is not None
        assert result.error["type"] == TimeLimitExceededError.__name__


async def test_a_task_that_ignores_its_time_limit_is_reported_once(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    enough = asyncio.Event()

    class Stubborn(BaseTask):
        time_limit_seconds = 0.05

        async def execute(self) -> None:
            while not enough.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await enough.wait()

    settings = {"report_overdue_seconds": 0.1}
    async with TaskSystem([Stubborn, Echo], redis_url=redis_url, settings=settings) as system:
        task_id = await Stubborn().schedule()

        def reports() -> list[str]:
            return [line for line in caplog.messages if "ignores its cancellation" in line]

        await until(reports)
        for _ in range(5):  # the watchdog looks again meanwhile
            await system.result(await Echo().schedule(at_time=datetime.now(UTC) + timedelta(seconds=0.05)))
        enough.set()
        result = await system.result(task_id)
        assert result.error is not None
        assert result.error["type"] == TimeLimitExceededError.__name__
        [line] = reports()
        assert task_id in line
        assert "0.1 s" in line


async def test_a_cancellation_that_a_library_swallowed_is_repeated(redis_url: str) -> None:
    """Like `asyncio.wait_for` of Python 3.11 when its awaitable ends at the same moment."""

    class Swallows(BaseTask):
        time_limit_seconds = 0.05

        async def execute(self) -> None:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            await asyncio.Event().wait()

    async with TaskSystem([Swallows], redis_url=redis_url, settings={"report_overdue_seconds": 0.1}) as system:
        result = await system.result(await Swallows().schedule())
        assert result.error is not None
        assert result.error["type"] == TimeLimitExceededError.__name__


async def test_P24_a_task_that_swallows_its_cancellation_has_not_succeeded(redis_url: str, redis: Redis) -> None:
    class Stubborn(BaseTask):
        @property
        def execution_locks(self) -> list[BaseLock]:
            return [MutexLock(JOB, "stubborn", ttl_ms=300)]

        async def execute(self) -> str:
            SEEN.append(1)
            if len(SEEN) == 2:
                return "the second time"
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            return "the first time"

    async with TaskSystem([Stubborn], redis_url=redis_url) as system:
        task_id = await Stubborn().schedule()
        await until(lambda: SEEN)
        await redis.set("lock:mutex:job:stubborn", "another", px=1_000)
        assert (await system.result(task_id)).return_value == "the second time"
