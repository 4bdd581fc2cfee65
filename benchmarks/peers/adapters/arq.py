"""arq. No bulk call: many are submitted by concurrent calls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Self

from arq import create_pool
from arq.connections import RedisSettings

from ..meter import sample, tick
from .base import NAP_SECONDS, Client, redis_url, stores_results


async def noop(context: dict[str, Any], number: int) -> None:
    tick()


async def return_one(context: dict[str, Any], number: int) -> int:
    tick()
    return 1


async def nap(context: dict[str, Any], number: int) -> None:
    tick()
    await asyncio.sleep(NAP_SECONDS)


async def clock(context: dict[str, Any], sent: float) -> None:
    sample(time.monotonic() - sent)


async def due(context: dict[str, Any], moment: float) -> None:
    sample(time.time() - moment)


class WorkerSettings:
    """Settings class of `arq`."""

    functions = (noop, return_one, nap, clock, due)
    redis_settings = RedisSettings.from_dsn(redis_url())
    max_jobs = 100
    keep_result = 3600 if stores_results() else 0
    log_results = False


class _Client(Client):
    async def __aenter__(self) -> Self:
        self._pool = await create_pool(RedisSettings.from_dsn(redis_url()))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._pool.aclose()

    async def submit(self, task: str, argument: Any) -> None:
        await self._pool.enqueue_job(task, argument)

    async def submit_many(self, task: str, arguments: Iterable[Any]) -> None:
        pending = list(arguments)
        for first in range(0, len(pending), 100):
            batch = pending[first : first + 100]
            await asyncio.gather(*(self._pool.enqueue_job(task, argument) for argument in batch))

    async def submit_at(self, task: str, argument: Any, moment: float) -> None:
        await self._pool.enqueue_job(task, argument, _defer_until=datetime.fromtimestamp(moment, UTC))


client = _Client
