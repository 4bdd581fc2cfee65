"""dramatiq with its Redis broker. It has threads and no event loop, and no bulk call."""

from __future__ import annotations

import time
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.rate_limits import ConcurrentRateLimiter
from dramatiq.rate_limits.backends import RedisBackend as LimiterBackend
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend as ResultBackend

from ..meter import sample, tick
from .base import NAP_SECONDS, Client, redis_url, stores_results

broker = RedisBroker(url=redis_url())
if stores_results():
    broker.add_middleware(Results(backend=ResultBackend(url=redis_url()), store_results=True))
dramatiq.set_broker(broker)
_limits = LimiterBackend(url=redis_url())


@dramatiq.actor
def noop(number: int) -> None:
    tick()


@dramatiq.actor
def return_one(number: int) -> int:
    tick()
    return 1


@dramatiq.actor
def nap(number: int) -> None:
    tick()
    time.sleep(NAP_SECONDS)


@dramatiq.actor
def clock(sent: float) -> None:
    sample(time.monotonic() - sent)


@dramatiq.actor
def due(moment: float) -> None:
    sample(time.time() - moment)


@dramatiq.actor
def mutex(number: int) -> None:
    with ConcurrentRateLimiter(_limits, f"mutex-{number}", limit=1).acquire():
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
        _BY_NAME[task].send(argument)

    async def submit_at(self, task: str, argument: Any, moment: float) -> None:
        delay_ms = max(0.0, moment - time.time()) * 1000
        _BY_NAME[task].send_with_options(args=(argument,), delay=round(delay_ms))


client = _Client
