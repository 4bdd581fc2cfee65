"""streaq, on uvloop by its own setting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Self

from streaq import Worker

from ..meter import sample, tick
from .base import NAP_SECONDS, Client, redis_url, stores_results

#: Seconds that a result is kept; 0: not at all.
_TTL = 3600 if stores_results() else 0

worker = Worker(redis_url=redis_url(), concurrency=100, anyio_kwargs={"use_uvloop": True})


@worker.task(ttl=_TTL, silent=True)
async def noop(number: int) -> None:
    tick()


@worker.task(ttl=_TTL, silent=True)
async def return_one(number: int) -> int:
    tick()
    return 1


@worker.task(ttl=_TTL, silent=True)
async def nap(number: int) -> None:
    tick()
    await asyncio.sleep(NAP_SECONDS)


@worker.task(ttl=_TTL, silent=True)
async def clock(sent: float) -> None:
    sample(time.monotonic() - sent)


@worker.task(ttl=_TTL, silent=True)
async def due(moment: float) -> None:
    sample(time.time() - moment)


_BY_NAME: dict[str, Any] = {"noop": noop, "return_one": return_one, "nap": nap, "clock": clock, "due": due}


class _Client(Client):
    async def __aenter__(self) -> Self:
        await worker.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await worker.__aexit__(*error)

    async def submit(self, task: str, argument: Any) -> None:
        await _BY_NAME[task].enqueue(argument)

    async def submit_many(self, task: str, arguments: Iterable[Any]) -> None:
        function = _BY_NAME[task]
        await worker.enqueue_many([function.enqueue(argument) for argument in arguments])

    async def submit_at(self, task: str, argument: Any, moment: float) -> None:
        await _BY_NAME[task].enqueue(argument).start(schedule=datetime.fromtimestamp(moment, UTC))


client = _Client
