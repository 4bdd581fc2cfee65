"""Time limits and cancellation, also of tasks that ignore them."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import UTC, datetime, timedelta

import pytest
from diracx.tasks.plumbing import (
    BaseTask,
    TimeLimitExceededError,
)
from diracx.tasks.testing import TaskSystem
from support.standard_tasks import Echo
from support.waiting import until

pytestmark = pytest.mark.event_loops("asyncio", "uvloop")


@pytest.mark.parametrize("swallows", ["nothing", "the cancellation", "the first cancellation, and goes on"])
async def test_a_task_past_its_time_limit_is_cancelled_and_has_failed(redis_url: str, swallows: str) -> None:
    """A library may swallow a cancellation, too: it is repeated.

    `asyncio.wait_for` of Python 3.11 does so when its awaitable ends at the same moment.
    """

    class Endless(BaseTask):
        time_limit_seconds = 0.05

        async def execute(self) -> str:
            if swallows == "nothing":
                await asyncio.Event().wait()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            if "first" in swallows:
                await asyncio.Event().wait()
            return "fine"

    async with TaskSystem([Endless], redis_url=redis_url, settings={"report_overdue_seconds": 0.1}) as system:
        result = await system.result(await Endless().schedule())
        assert result.error is not None
        assert result.error["type"] == TimeLimitExceededError.__name__
        assert "0.05 s" in result.error["message"]


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
