"""Tasks in a process that a test kills."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diracx.tasks.plumbing import BaseTask, MutexLock, SharedRWLock
from diracx.tasks.plumbing.broker import RedisStreamBroker
from diracx.tasks.plumbing.broker.models import Delivery
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.plumbing.registry import TaskRegistry
from diracx.tasks.plumbing.worker import Worker
from diracx.tasks.plumbing.worker import worker as worker_module
from diracx.tasks.plumbing.worker.executor import Executor
from diracx.tasks.plumbing.worker.settings import WorkerSettings
from diracx.tasks.testing import TaskSystem

LEASE_SECONDS = 1.0


@dataclass
class Marks(BaseTask):
    """Says that it started, and ends when it may (or never)."""

    key: str
    ends: bool = False

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(JOB, self.key), SharedRWLock(JOB, f"{self.key}-read")]

    async def execute(self) -> int:
        from redis.asyncio import Redis

        async with Redis.from_url(os.environ["TEST_REDIS_URL"]) as redis:
            await redis.rpush(f"started:{self.key}", os.getpid())
            await redis.expire(f"started:{self.key}", 60)
            if not self.ends and os.environ.get("TEST_HANGS"):
                await asyncio.Event().wait()
        return os.getpid()


@dataclass
class Blocks(BaseTask):
    """Blocks the event loop for several leases."""

    seconds: float

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(JOB, "blocks", ttl_ms=600)]

    async def execute(self) -> str:
        time.sleep(self.seconds)  # what a careless author does
        return "kept"


class MarksOnce(Marks):
    """Must not begin twice."""

    at_most_once = True
    dlq_eligible = True


class Kills(BaseTask):
    """Takes its worker with it."""

    async def execute(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class KillsTwice(BaseTask):
    """Kills two workers; the next time it takes the given time."""

    async def execute(self) -> int:
        from redis.asyncio import Redis

        async with Redis.from_url(os.environ["TEST_REDIS_URL"]) as redis:
            if await redis.incr("begun:twice") < 3:
                os.kill(os.getpid(), signal.SIGKILL)
            while not await redis.exists("may-end:twice"):
                await asyncio.sleep(0.01)
        return os.getpid()


@dataclass
class Notes(BaseTask):
    """Says where it ran. Needs no lock."""

    key: str

    async def execute(self) -> int:
        from redis.asyncio import Redis

        async with Redis.from_url(os.environ["TEST_REDIS_URL"]) as redis:
            await redis.rpush(f"started:{self.key}", os.getpid())
            await redis.expire(f"started:{self.key}", 60)
        return os.getpid()


TASKS = [Marks, MarksOnce, Blocks, Kills, KillsTwice, Notes]


class PausesOnce(Executor):
    """Is stopped between its first message and the start of that; its lease is renewed before it goes on."""

    async def start(self, deliveries: Sequence[Delivery], *args: Any, **kwargs: Any) -> None:
        if deliveries and not hasattr(self, "paused"):
            self.paused = True
            os.kill(os.getpid(), signal.SIGSTOP)
            while self._keeper.overdue:
                await asyncio.sleep(0.01)
        await super().start(deliveries, *args, **kwargs)


async def serve_with_a_pause(redis_url: str) -> None:
    broker = RedisStreamBroker(redis_url)
    registry = TaskRegistry({"test:Notes": Notes})
    worker_module.Executor = PausesOnce  # type: ignore[misc]  # in this process, which has one worker
    worker = Worker(broker, registry, settings=WorkerSettings(lease_seconds=LEASE_SECONDS))
    running = asyncio.create_task(worker.run(asyncio.Event()))
    await worker.ready.wait()
    print("ready", flush=True)
    await running


async def serve(redis_url: str) -> None:
    settings = {"lease_seconds": LEASE_SECONDS}
    async with TaskSystem(
        TASKS, redis_url=redis_url, workers=1, scheduler=False, task_db_url=None, settings=settings
    ):
        print("ready", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run((serve_with_a_pause if os.environ.get("TEST_PAUSES") else serve)(sys.argv[1]))
