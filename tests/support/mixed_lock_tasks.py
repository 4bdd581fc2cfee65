"""Tasks with any locks that record their execution outside Redis, and a process that runs them."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from dataclasses import dataclass

from diracx.tasks.plumbing import (
    BaseTask,
    ConcurrencyLimiter,
    ExclusiveRWLock,
    MutexLock,
    Priority,
    RateLimiter,
    SharedRWLock,
    Size,
)
from diracx.tasks.plumbing.broker import RedisStreamBroker
from diracx.tasks.plumbing.lock_registry import JOB, LockedObjectType
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.plumbing.registry import TaskRegistry
from diracx.tasks.plumbing.worker import Worker
from diracx.tasks.plumbing.worker.settings import WorkerSettings

SLOTS = 2


class Slots(ConcurrencyLimiter):
    limit = SLOTS


class Rate(RateLimiter):
    limit = 20
    window_seconds = 0.5


class WholeRate(Rate):
    """All of the quota at once."""

    def __init__(self, obj: LockedObjectType, key: int) -> None:
        super().__init__(obj, key, n_items=Rate.limit)


KINDS: dict[str, type[BaseLock]] = {
    "mutex": MutexLock,
    "write": ExclusiveRWLock,
    "read": SharedRWLock,
    "slot": Slots,
    "rate": Rate,
    "all": WholeRate,
}


@dataclass
class Mixed(BaseTask):
    """Works for a moment under its locks."""

    name: str
    wishes: list[tuple[str, int]]

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [KINDS[kind](JOB, key) for kind, key in self.wishes]

    async def execute(self) -> None:
        note("begins", self.name)
        await asyncio.sleep(0.01)
        note("ends", self.name)


@dataclass
class SmallMixed(Mixed):
    size = Size.SMALL


@dataclass
class UrgentMixed(Mixed):
    priority = Priority.REALTIME


REGISTRY = {f"test:{task.__name__}": task for task in (Mixed, SmallMixed, UrgentMixed)}


def note(what: str, name: str) -> None:
    """One line in one write, so that no other process's comes between."""
    with open(os.environ["TEST_WITNESS"], "ab", buffering=0) as witness:
        witness.write(f"{time.monotonic()} {os.getpid()} {what} {name}\n".encode())


async def serve(redis_url: str, size: str) -> None:
    broker = RedisStreamBroker(redis_url, worker_size=size)
    settings = WorkerSettings(lease_seconds=2.0, max_concurrent_tasks=5)
    worker = Worker(broker, TaskRegistry(REGISTRY), settings=settings)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(15, stop.set)
    running = asyncio.create_task(worker.run(stop))
    await worker.ready.wait()
    print("ready", flush=True)
    await running


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], sys.argv[2]))
