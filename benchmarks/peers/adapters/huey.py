"""huey with its Redis storage. It has threads and no event loop, and no bulk call."""

from __future__ import annotations

import time
from typing import Any

from huey import RedisHuey

from ..meter import sample, tick
from .base import NAP_SECONDS, Client, redis_url, stores_results

huey = RedisHuey("bench", url=redis_url(), results=stores_results())


@huey.task()
def noop(number: int) -> None:
    tick()


@huey.task()
def return_one(number: int) -> int:
    tick()
    return 1


@huey.task()
def nap(number: int) -> None:
    tick()
    time.sleep(NAP_SECONDS)


@huey.task()
def clock(sent: float) -> None:
    sample(time.monotonic() - sent)


@huey.task()
def due(moment: float) -> None:
    sample(time.time() - moment)


@huey.task()
def mutex(number: int) -> None:
    with huey.lock_task(f"mutex-{number}"):
        tick()


_BY_NAME: dict[str, Any] = {
    "noop": noop,
    "return_one": return_one,
    "nap": nap,
    "clock": clock,
    "due": due,
    "mutex": mutex,
}


class _Client(Client):
    async def submit(self, task: str, argument: Any) -> None:
        _BY_NAME[task](argument)

    async def submit_at(self, task: str, argument: Any, moment: float) -> None:
        _BY_NAME[task].schedule((argument,), delay=max(0.0, moment - time.time()))


client = _Client
