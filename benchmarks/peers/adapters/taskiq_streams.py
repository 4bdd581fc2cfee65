"""taskiq with the streams broker of taskiq-redis. No bulk call: many are submitted by concurrent calls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Self

from taskiq import TaskiqScheduler
from taskiq.serializers import ORJSONSerializer
from taskiq_redis import ListRedisScheduleSource, RedisAsyncResultBackend, RedisStreamBroker

from ..meter import sample, tick
from .base import NAP_SECONDS, Client, redis_url, stores_results

broker = RedisStreamBroker(redis_url()).with_serializer(ORJSONSerializer())
if stores_results():
    broker = broker.with_result_backend(RedisAsyncResultBackend(redis_url(), result_ex_time=3600))
schedules = ListRedisScheduleSource(redis_url())
scheduler = TaskiqScheduler(broker, [schedules])


@broker.task("noop")
async def noop(number: int) -> None:
    tick()


@broker.task("return_one")
async def return_one(number: int) -> int:
    tick()
    return 1


@broker.task("nap")
async def nap(number: int) -> None:
    tick()
    await asyncio.sleep(NAP_SECONDS)


@broker.task("clock")
async def clock(sent: float) -> None:
    sample(time.monotonic() - sent)


@broker.task("due")
async def due(moment: float) -> None:
    sample(time.time() - moment)


_BY_NAME: dict[str, Any] = {"noop": noop, "return_one": return_one, "nap": nap, "clock": clock, "due": due}


class _Client(Client):
    async def __aenter__(self) -> Self:
        await broker.startup()
        await schedules.startup()
        return self

    async def __aexit__(self, *_: object) -> None:
        await schedules.shutdown()
        await broker.shutdown()

    async def submit(self, task: str, argument: Any) -> None:
        await _BY_NAME[task].kiq(argument)

    async def submit_many(self, task: str, arguments: Iterable[Any]) -> None:
        function = _BY_NAME[task]
        pending = list(arguments)
        for first in range(0, len(pending), 100):
            await asyncio.gather(*(function.kiq(argument) for argument in pending[first : first + 100]))

    async def submit_at(self, task: str, argument: Any, moment: float) -> None:
        await _BY_NAME[task].schedule_by_time(schedules, datetime.fromtimestamp(moment, UTC), argument)


client = _Client
