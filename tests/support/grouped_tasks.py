"""Children and callbacks of groups."""

from __future__ import annotations

__all__ = ["GROUP_TASKS", "Callback", "Child", "Fails", "Locked", "Sum", "brokers", "ended"]

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from diracx.tasks.plumbing import (
    BaseTask,
    ChildResults,
    ExponentialBackoff,
    MutexLock,
)
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.broker.models import Delivery, Settlement, TaskMessage
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock

from support.standard_tasks import SEEN


@dataclass
class Child(BaseTask):
    number: int

    async def execute(self) -> int:
        SEEN.append(self.number)
        return self.number * self.number


@dataclass
class Callback(BaseTask):
    text: str = "callback"

    async def execute(self) -> None:
        SEEN.append(self.text)


@dataclass
class Fails(BaseTask):
    retry_policy = ExponentialBackoff(base_delay_seconds=0.02, max_retries=2)

    async def execute(self) -> None:
        SEEN.append("attempt")
        raise ValueError("there is no such site")


@dataclass
class Locked(BaseTask):
    number: int

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(JOB, "of-the-group")]

    async def execute(self) -> None:
        await asyncio.sleep(0)
        SEEN.append(self.number)


@dataclass
class Sum(BaseTask):
    async def execute(self, results: ChildResults) -> list[Any]:
        return [result.error["type"] if result.error else result.return_value for result in results.values()]


GROUP_TASKS = [Child, Callback, Fails, Locked, Sum]


# --- exactly once ----------------------------------------------------------------------------------------


@asynccontextmanager
async def brokers(redis_url: str) -> AsyncIterator[tuple[RedisStreamBroker, RedisStreamBroker]]:
    """Two workers' brokers, moved by hand."""
    pair = RedisStreamBroker(redis_url, consumer_name="one"), RedisStreamBroker(redis_url, consumer_name="two")
    try:
        yield pair
    finally:
        for broker in pair:
            await broker.redis.delete(keys.ALIVE)
            await broker.leave()
            await broker.shutdown()


def ended(delivery: Delivery, error: str | None = None) -> Settlement:
    assert delivery.data is not None
    message = TaskMessage.loadb(delivery.data)
    group = {"id": message.labels["group_id"], "child": message.task_id, **({"error": error} if error else {})}
    return Settlement(delivery, group=group)
