"""Tasks, and a process that runs them, for tests that kill it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from dataclasses import dataclass

from diracx.tasks.plumbing import BaseTask, MutexLock, SharedRWLock
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock
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


class Kills(BaseTask):
    """Takes its worker with it."""

    async def execute(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


TASKS = [Marks, Blocks, Kills]


async def serve(redis_url: str) -> None:
    settings = {"lease_seconds": LEASE_SECONDS}
    async with TaskSystem(
        TASKS, redis_url=redis_url, workers=1, scheduler=False, task_db_url=None, settings=settings
    ):
        print("ready", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
