"""Lateness of periodic and delayed tasks, and the costs of an idle scheduler."""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from diracx.tasks.plumbing import BaseTask, PeriodicVoAwareBaseTask, Size, schedule_many
from diracx.tasks.plumbing.base_task import current_message
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.broker.labels import LABEL_DUE
from diracx.tasks.plumbing.config import TasksConfig
from diracx.tasks.plumbing.scheduler import TaskScheduler
from diracx.tasks.plumbing.scheduler.occurrences import iter_schedules
from diracx.tasks.plumbing.schedules import CronSchedule
from diracx.tasks.testing import TaskSystem, embedded_redis

#: Nothing is kept of a finished task, as in production; delayed tasks are the scheduler's alone here.
SETTINGS = {"result_ttl_seconds": None, "housekeeping_seconds": 20.0}
PERIOD_SECONDS = 30

late_ms: dict[str, list[float]] = {}


class Periodic(PeriodicVoAwareBaseTask):
    """Notes how late it is."""

    default_schedule = CronSchedule("0 0 1 1 *")
    size = Size.SMALL

    async def execute(self) -> None:
        message = current_message.get()
        assert message is not None
        late_ms["periodic"].append(time.time() * 1000 - message.labels[LABEL_DUE])


@dataclass
class Delayed(BaseTask):
    """Notes how late it is."""

    due: float

    async def execute(self) -> None:
        late_ms["delayed"].append((time.time() - self.due) * 1000)


REGISTRY = {"bench:Periodic": Periodic, "bench:Delayed": Delayed}


def vos(schedules: int) -> list[str]:
    return [f"vo{number:04}" for number in range(schedules)]


def config(kind: str) -> TasksConfig:
    """Due times: `far` away; in a `burst`, all at one instant; or `spread` over the period."""
    far = {"schedule": "0 0 1 1 *"}
    burst = {"schedule": f"* * * * * */{PERIOD_SECONDS}"}
    periodic = {"far": far, "burst": burst, "spread": {"interval_seconds": PERIOD_SECONDS}}
    return TasksConfig.model_validate({"common": {"bench:Periodic": {"periodic": periodic[kind]}}})


async def scatter(url: str, schedules: int) -> None:
    """Leave the schedules as a scheduler leaves them that has run for a while: each in a phase of its own."""
    broker = RedisStreamBroker(url)
    begin = time.time() + 8
    for found in iter_schedules(REGISTRY, config("spread"), vos(schedules)):
        assert found.rule is not None
        await broker.redis.hset(keys.FINGERPRINTS, found.id, found.rule.fingerprint)
        due = begin + random.uniform(0, PERIOD_SECONDS)
        await broker.redis.zadd(keys.NEXT_RUNS, {found.id: int(due * 1000)})
    await broker.shutdown()


async def serve(url: str, schedules: int, kind: str) -> None:
    """A scheduler, as a process of its own."""
    broker = RedisStreamBroker(url)
    scheduler = TaskScheduler(broker, REGISTRY, config=config(kind), vos=vos(schedules))
    await scheduler.run(asyncio.Event())


@asynccontextmanager
async def schedulers(url: str, schedules: int, kind: str, number: int = 1) -> AsyncIterator[list[int]]:
    """Start that many scheduler processes, ended with the block. Yields their process ids, the leader's first."""
    running = []
    broker = RedisStreamBroker(url)
    try:
        for _ in range(number):
            program = (sys.executable, "-m", "benchmarks.lateness", url, str(schedules), kind)
            running.append(await asyncio.create_subprocess_exec(*program))
            while (
                not await broker.redis.exists(keys.LEADER) or await broker.redis.zcard(keys.NEXT_RUNS) < schedules
            ):
                await asyncio.sleep(0.05)
        while (await broker.redis.pubsub_numsub(keys.LEADER))[0][1] < number - 1:
            await asyncio.sleep(0.05)
        yield [process.pid for process in running]
    finally:
        for process in running:
            process.kill()
            await process.wait()
        await broker.shutdown()


async def lateness(
    kind: str, schedules: int = 1_000, waiting: int = 100_000, delayed: int = 2_000, seconds: float = 40
) -> dict[str, list[float]]:
    """Milliseconds from the moment at which tasks were due to that at which they began, by kind of task.

    Args:
        kind: how the schedules lie, see `config`.
        waiting: delayed tasks that are not due for long.
        delayed: delayed tasks that become due meanwhile.

    Returns:
        `periodic` and `delayed`, and in `queued` how late the periodic ones were in their stream.
    """
    late_ms.update(periodic=[], delayed=[])
    with embedded_redis() as url:
        async with TaskSystem(
            REGISTRY,
            redis_url=url,
            workers=1,
            concurrency=100,
            scheduler=False,
            settings=SETTINGS,
            task_db_url=None,
        ) as system:
            later = datetime.now(UTC) + timedelta(days=1)
            for first in range(0, waiting, 5_000):
                await schedule_many([Delayed(0.0)] * min(5_000, waiting - first), at_time=later)
            if kind == "spread":
                await scatter(url, schedules)
            async with schedulers(url, schedules, kind):
                await asyncio.sleep(3)  # what is due first is prepared
                late_ms["periodic"].clear()
                begin = time.time() + 1
                for _ in range(delayed):
                    due = begin + random.uniform(0, seconds - 5)
                    await Delayed(due).schedule(at_time=datetime.fromtimestamp(due, UTC))
                queued = await _queued(system, begin + seconds)
    return {**{kind: list(figures) for kind, figures in late_ms.items()}, "queued": queued}


async def _queued(system: TaskSystem, until: float) -> list[float]:
    """Measure how late occurrences are submitted: the server stamps stream entries with its time."""
    found: dict[bytes, float] = {}
    while time.time() < until:
        await asyncio.sleep(1.03)
        for last in await system.broker.redis.execute_command("HVALS", keys.LAST_RUNS):
            _, entry, task, due = last.split(b" ")
            found[task] = int(entry.split(b"-")[0]) - int(due)
    return list(found.values())


def percentiles(figures: Sequence[float]) -> tuple[float, float]:
    """p50 and p99."""
    cuts = statistics.quantiles(figures, n=100)
    return cuts[49], cuts[98]


async def idle(schedules: int = 1_000, seconds: float = 30) -> tuple[float, float]:
    """Share of one core that a leader, and one that stands by, use while nothing is due."""
    with embedded_redis() as url:
        async with schedulers(url, schedules, "far", 2) as pids:
            await asyncio.sleep(5)
            before = [_cpu_seconds(pid) for pid in pids]
            await asyncio.sleep(seconds)
            leader, standby = (
                (_cpu_seconds(pid) - used) / seconds for pid, used in zip(pids, before, strict=True)
            )
    return leader, standby


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
