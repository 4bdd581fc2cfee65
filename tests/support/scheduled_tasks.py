"""Tasks with schedules, and schedulers in this process."""

from __future__ import annotations

__all__ = [
    "HOUR_MS",
    "STREAM",
    "Hourly",
    "HourlyOrNot",
    "PerVo",
    "look",
    "named",
    "next_runs",
    "scheduling",
    "submitted",
]

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any, ClassVar, Literal

from diracx.tasks.plumbing import (
    BaseTask,
    IntervalSeconds,
    PeriodicBaseTask,
    PeriodicVoAwareBaseTask,
    TasksConfig,
)
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.broker.models import TaskMessage
from diracx.tasks.plumbing.scheduler import ScheduleState, TaskScheduler, schedules
from redis.asyncio import Redis

STREAM = "diracx:tasks:normal:medium"


HOUR_MS = 3600_000


class Hourly(PeriodicBaseTask):
    default_schedule = IntervalSeconds(3600)

    async def execute(self) -> None: ...


class HourlyOrNot(Hourly):
    missed: ClassVar[Literal["once", "skip"]] = "skip"


class PerVo(PeriodicVoAwareBaseTask):
    default_schedule = IntervalSeconds(3600)

    async def execute(self) -> None: ...


def named(*tasks: type[BaseTask]) -> dict[str, type[BaseTask]]:
    return {f"test:{task.__name__}": task for task in tasks}


@asynccontextmanager
async def scheduling(
    url: str,
    *tasks: type[BaseTask],
    config: Mapping[str, Any] | None = None,
    vos: Iterable[str] = (),
    lease_seconds: float = 6.0,
) -> AsyncIterator[TaskScheduler]:
    """A scheduler that leads."""
    broker = RedisStreamBroker(url)
    of_ours = TasksConfig.model_validate(config or {})
    scheduler = TaskScheduler(broker, named(*tasks), config=of_ours, vos=vos, lease_seconds=lease_seconds)
    stop = asyncio.Event()
    running = asyncio.create_task(scheduler.run(stop))
    try:
        await asyncio.wait(
            {running, leading := asyncio.create_task(scheduler.leads.wait())}, return_when=asyncio.FIRST_COMPLETED
        )
        assert leading.done()
        yield scheduler
    finally:
        stop.set()
        await running
        await broker.shutdown()


async def submitted(redis: Redis) -> list[TaskMessage]:
    return [TaskMessage.loadb(fields[b"data"]) for _, fields in await redis.xrange(STREAM)]


async def next_runs(redis: Redis) -> dict[str, int]:
    return {name.decode(): int(due) for name, due in await redis.zrange(keys.NEXT_RUNS, 0, -1, withscores=True)}


async def look(
    redis: Redis, *tasks: type[BaseTask], config: Mapping[str, Any] | None = None, vos: Iterable[str] = ()
) -> dict[str, ScheduleState]:
    tasks_config = TasksConfig.model_validate(config or {})
    return {state.id: state for state in await schedules(redis, named(*tasks), tasks_config, vos)}
