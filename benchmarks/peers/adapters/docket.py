"""pydocket. Its command has no option for how long done tasks are kept, so the worker is started from here:
`python -m benchmarks.peers.adapters.docket CONCURRENCY`.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any, Self

import uvloop
from docket import ConcurrencyLimit, Docket, Worker

from ..meter import sample, tick
from .base import ALONE_SECONDS, NAP_SECONDS, Client, redis_url, stores_results


async def noop(number: int) -> None:
    tick()


async def return_one(number: int) -> int:
    tick()
    return 1


async def nap(number: int) -> None:
    tick()
    await asyncio.sleep(NAP_SECONDS)


async def clock(sent: float) -> None:
    sample(time.monotonic() - sent)


async def due(moment: float) -> None:
    sample(time.time() - moment)


async def mutex(number: int, limit: ConcurrencyLimit = ConcurrencyLimit("number", max_concurrent=1)) -> None:  # noqa: B008  # as documented
    tick()


async def alone(number: int, limit: ConcurrencyLimit = ConcurrencyLimit(max_concurrent=1)) -> None:  # noqa: B008  # as documented
    tick()
    await asyncio.sleep(ALONE_SECONDS)


_BY_NAME: dict[str, Any] = {each.__name__: each for each in (noop, return_one, nap, clock, due, mutex, alone)}


def _docket() -> Docket:
    docket = Docket(
        name="bench",
        # A hundred tasks at a time need more connections than redis-py has by default.
        url=f"{redis_url()}?max_connections=1000",
        execution_ttl=timedelta(seconds=3600 if stores_results() else 0),
    )
    for function in _BY_NAME.values():
        docket.register(function)
    return docket


class _Client(Client):
    async def __aenter__(self) -> Self:
        self._stack = AsyncExitStack()
        self._docket = await self._stack.enter_async_context(_docket())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def submit(self, task: str, argument: Any) -> None:
        await self._docket.add(_BY_NAME[task])(argument)

    async def submit_many(self, task: str, arguments: Iterable[Any]) -> None:
        call = self._docket.call
        await self._docket.add_many([call(_BY_NAME[task])(argument) for argument in arguments])

    async def submit_at(self, task: str, argument: Any, moment: float) -> None:
        await self._docket.add(_BY_NAME[task], when=datetime.fromtimestamp(moment, UTC))(argument)


client = _Client


async def work(concurrency: int) -> None:
    async with (
        _docket() as docket,
        # Otherwise as its command has it.
        Worker(docket, concurrency=concurrency, minimum_check_interval=timedelta(milliseconds=100)) as worker,
    ):
        await worker.run_forever()


if __name__ == "__main__":
    uvloop.run(work(int(sys.argv[1])))
