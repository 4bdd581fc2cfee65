"""Tasks that record their execution under a lock outside Redis, and a process that runs them."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from dataclasses import dataclass

from diracx.tasks.plumbing import BaseTask, ConcurrencyLimiter, ExclusiveRWLock, MutexLock, SharedRWLock
from diracx.tasks.plumbing.broker import RedisStreamBroker
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.plumbing.registry import TaskRegistry
from diracx.tasks.plumbing.worker import Worker
from diracx.tasks.plumbing.worker.settings import WorkerSettings


class One(ConcurrencyLimiter):
    limit = 1


#: Each with its default time to live (30 s), far more than the lease; and one with far less.
LOCKS = {
    "mutex": lambda: MutexLock(JOB, "witnessed"),
    "short mutex": lambda: MutexLock(JOB, "witnessed", ttl_ms=500),
    "writer": lambda: ExclusiveRWLock(JOB, "witnessed"),
    "reader": lambda: SharedRWLock(JOB, "witnessed"),
    "slot": lambda: One(JOB, "witnessed"),
}


def note() -> None:
    """Say that this process works under the lock now."""
    with open(os.environ["TEST_WITNESS"], "a") as witness:
        witness.write(f"{os.getpid()} {time.monotonic()}\n")


@dataclass
class WorksUnderLock(BaseTask):
    """Notes that it works, each 20 ms."""

    lock: str
    seconds: float

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [LOCKS[self.lock]()] if self.lock else []

    async def execute(self) -> None:
        ends = time.monotonic() + self.seconds
        while time.monotonic() < ends:
            note()
            await asyncio.sleep(0.02)


@dataclass
class BlocksUnderLock(WorksUnderLock):
    """Blocks the event loop, then notes that it has ended."""

    async def execute(self) -> None:
        note()
        time.sleep(self.seconds)  # what a careless author does
        note()


async def serve(redis_url: str, lease_seconds: float) -> None:
    registry = TaskRegistry({"test:WorksUnderLock": WorksUnderLock, "test:BlocksUnderLock": BlocksUnderLock})
    worker = Worker(RedisStreamBroker(redis_url), registry, settings=WorkerSettings(lease_seconds=lease_seconds))
    running = asyncio.create_task(worker.run(asyncio.Event()))
    await worker.ready.wait()
    print("ready", flush=True)
    await running


if __name__ == "__main__":
    factory = None
    if sys.argv[3] == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(serve(sys.argv[1], float(sys.argv[2])))
