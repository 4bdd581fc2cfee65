"""Costs of the task system: rates, latency, bytes, import time."""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from diracx.tasks.plumbing import BaseTask, MutexLock, schedule_many
from diracx.tasks.plumbing.broker.keys import stream_name_for
from diracx.tasks.plumbing.lock_registry import TASK
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.testing import TaskSystem, embedded_redis

STREAM = stream_name_for("normal", "medium")
#: Nothing is kept of a finished task, as in production.
SETTINGS = {"result_ttl_seconds": None, "housekeeping_seconds": 1.0}

started: list[float] = []


@dataclass
class NoOp(BaseTask):
    """Does nothing."""

    number: int

    async def execute(self) -> None:
        pass


@dataclass
class Clock(BaseTask):
    """Notes when it starts."""

    number: int

    async def execute(self) -> None:
        started.append(time.perf_counter())


async def median_of(rounds: int, measure: Callable[[], Awaitable[float]]) -> float:
    return statistics.median([await measure() for _ in range(rounds)])


async def drain_rate(tasks: int = 20_000, concurrency: int = 100) -> float:
    """Tasks per second of one worker with a backlog of no-ops."""
    with embedded_redis() as url:
        async with TaskSystem([NoOp], redis_url=url, workers=0, scheduler=False):
            await schedule_many([NoOp(number) for number in range(tasks)])
        begin = time.perf_counter()
        async with TaskSystem(
            [NoOp],
            redis_url=url,
            workers=1,
            scheduler=False,
            concurrency=concurrency,
            settings=SETTINGS,
            task_db_url=None,
        ) as system:
            while await system.broker.redis.xlen(STREAM):
                await asyncio.sleep(0.005)
            return tasks / (time.perf_counter() - begin)


@dataclass
class Alone(BaseTask):
    """A millisecond of work that must not overlap with its like."""

    number: int

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(TASK, "alone")]

    async def execute(self) -> None:
        await asyncio.sleep(0.001)


async def one_mutex(tasks: int = 200) -> tuple[float, float]:
    """Seconds for tasks behind one mutex through a worker, and for the same one after another in a loop."""
    async with TaskSystem([Alone], workers=1, concurrency=100, settings=SETTINGS, task_db_url=None) as system:
        begin = time.perf_counter()
        await schedule_many([Alone(number) for number in range(tasks)])
        await system.drain(120)
        through_worker = time.perf_counter() - begin
        begin = time.perf_counter()
        for number in range(tasks):
            task = Alone(number)
            [lock] = task.execution_locks
            await lock.acquire(system.broker.redis)
            await task.execute()
            await lock.release(system.broker.redis)
        return through_worker, time.perf_counter() - begin


async def enqueue_one_by_one(tasks: int = 5_000) -> float:
    """Tasks per second through `schedule()`, each awaited."""
    async with TaskSystem([NoOp], workers=0, scheduler=False):
        begin = time.perf_counter()
        for number in range(tasks):
            await NoOp(number).schedule()
        return tasks / (time.perf_counter() - begin)


async def enqueue_in_bulk(tasks: int = 20_000) -> float:
    """Tasks per second through `schedule_many()`."""
    async with TaskSystem([NoOp], workers=0, scheduler=False):
        begin = time.perf_counter()
        await schedule_many([NoOp(number) for number in range(tasks)])
        return tasks / (time.perf_counter() - begin)


async def idle_latency(tasks: int = 500) -> tuple[float, float]:
    """Seconds from `schedule()` to `execute()` on an idle system: p50, p99."""
    latencies = []
    async with TaskSystem([Clock], workers=1, scheduler=False, settings=SETTINGS, task_db_url=None):
        for number in range(tasks):
            started.clear()
            begin = time.perf_counter()
            await Clock(number).schedule()
            while not started:
                await asyncio.sleep(0.0002)
            latencies.append(started[0] - begin)
            await asyncio.sleep(0.01)
    cuts = statistics.quantiles(latencies, n=100)
    return cuts[49], cuts[98]


async def bytes_per_task(tasks: int = 20_000) -> tuple[float, float]:
    """Bytes of Redis memory for a queued no-op, and for all that is left when they are done."""
    async with TaskSystem([NoOp], workers=0, scheduler=False) as system:
        redis = system.broker.redis

        async def used() -> int:
            sizes = [await redis.memory_usage(key, samples=0) for key in await redis.keys("*")]
            return sum(size or 0 for size in sizes)

        before = await used()
        await schedule_many([NoOp(number) for number in range(tasks)])
        queued = (await used() - before) / tasks
        async with TaskSystem(
            [NoOp],
            redis_url=system.redis_url,
            workers=1,
            scheduler=False,
            concurrency=100,
            settings=SETTINGS,
            task_db_url=None,
        ) as workers:
            await workers.drain(60)
        return queued, await used() - before


async def snapshot_time(tasks: int = 1_000_000, rounds: int = 5) -> float:
    """Seconds that a snapshot takes with so many tasks queued: the median."""
    from diracx.tasks.operations import snapshot
    from diracx.tasks.plumbing.broker.models import TaskMessage

    async with TaskSystem([NoOp], workers=0, scheduler=False) as system:
        redis = system.broker.redis
        message = TaskMessage(task_id="0" * 32, task_name="test:NoOp", task_args=[1]).dumpb()
        for _ in range(tasks // 5000):
            async with redis.pipeline(transaction=False) as pipe:
                for _ in range(5000):
                    pipe.execute_command("XADD", STREAM, "*", "data", message)
                await pipe.execute()
        times = []
        for _ in range(rounds):
            begin = time.perf_counter()
            seen = await snapshot(redis)
            times.append(time.perf_counter() - begin)
        assert sum(queue.backlog for queue in seen.queues) == tasks
    return statistics.median(times)


def import_time(statement: str, rounds: int = 5) -> float:
    """Seconds that an import adds to the start of a Python process: the median."""

    def run(code: str) -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - begin

    bare = statistics.median(run("pass") for _ in range(rounds))
    return statistics.median(run(statement) for _ in range(rounds)) - bare
