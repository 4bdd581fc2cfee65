"""SAQ. It has no bulk call: many tasks are submitted by concurrent calls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any, Self

import orjson
from saq import Queue

from ..meter import sample, tick
from .base import NAP_SECONDS, Client, redis_url, stores_results

#: Seconds that a finished job is kept; -1: not at all.
_TTL = 3600 if stores_results() else -1

queue = Queue.from_url(redis_url(), dump=orjson.dumps, load=orjson.loads)


async def noop(context: dict[str, Any], *, value: int) -> None:
    tick()


async def return_one(context: dict[str, Any], *, value: int) -> int:
    tick()
    return 1


async def nap(context: dict[str, Any], *, value: int) -> None:
    tick()
    await asyncio.sleep(NAP_SECONDS)


async def clock(context: dict[str, Any], *, value: float) -> None:
    sample(time.monotonic() - value)


async def due(context: dict[str, Any], *, value: float) -> None:
    sample(time.time() - value)


settings = {"queue": queue, "functions": [noop, return_one, nap, clock, due], "concurrency": 100}


class _Client(Client):
    async def __aenter__(self) -> Self:
        await queue.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await queue.disconnect()

    async def submit(self, task: str, argument: Any) -> None:
        await queue.enqueue(task, value=argument, ttl=_TTL)

    async def submit_many(self, task: str, arguments: Iterable[Any]) -> None:
        await asyncio.gather(*(queue.enqueue(task, value=argument, ttl=_TTL) for argument in arguments))

    async def submit_at(self, task: str, argument: Any, moment: float) -> None:
        await queue.enqueue(task, value=argument, ttl=_TTL, scheduled=moment)


client = _Client
