"""Tasks for tests of cancellation, and checks that nothing of them is left."""

from __future__ import annotations

__all__ = [
    "TASKS",
    "Fails",
    "Gate",
    "Hangs",
    "Limited",
    "Locked",
    "Scarce",
    "failed_as_cancelled",
    "nothing_is_left",
]

import asyncio
from dataclasses import dataclass

from diracx.tasks.plumbing import (
    BaseTask,
    ExponentialBackoff,
    MutexLock,
    RateLimiter,
)
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.testing import TaskSystem

from support.standard_tasks import SEEN, Echo


class Gate:
    """Event that tasks wait for; a new one for each test and its event loop."""

    event: asyncio.Event


@dataclass
class Hangs(BaseTask):
    """Never ends by itself, would be retried for ever, and belongs among the dead letters."""

    retry_policy = ExponentialBackoff(base_delay_seconds=0, max_retries=100)
    dlq_eligible = True

    async def execute(self) -> None:
        SEEN.append("begun")
        try:
            await Gate.event.wait()
        except asyncio.CancelledError:
            SEEN.append("cancelled")
            raise


@dataclass
class Locked(BaseTask):
    number: int

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(JOB, "contended")]

    async def execute(self) -> int:
        SEEN.append(self.number)
        if self.number == 0:
            await Gate.event.wait()
        return self.number


class Fails(BaseTask):
    retry_policy = ExponentialBackoff(base_delay_seconds=3600, max_retries=3)
    dlq_eligible = True

    async def execute(self) -> None:
        SEEN.append("attempt")
        raise ValueError("no")


class Scarce(RateLimiter):
    limit = 1
    window_seconds = 600.0


class Limited(BaseTask):
    @property
    def execution_locks(self) -> list[BaseLock]:
        return [Scarce(JOB, "scarce")]

    async def execute(self) -> None:
        SEEN.append("limited")


TASKS = [Echo, Hangs, Locked, Fails, Limited]


async def failed_as_cancelled(system: TaskSystem, task_id: str) -> None:
    result = await system.result(task_id)
    assert result.error is not None
    assert result.error["type"] == "TaskCancelledError"


async def nothing_is_left(system: TaskSystem) -> None:
    await system.drain()
    assert not await system.broker.redis.exists(keys.CANCELLED, keys.DELAYED, keys.DELAYED_DATA)
    assert system.task_db is not None
    async with system.task_db as db:
        assert await db.search() == [], "a cancelled task is no dead letter"
