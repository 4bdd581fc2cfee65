"""The upper limit: a loop of redis-py, without guarantees: `python -m benchmarks.peers.adapters.bare MODE`.

MODE `await` awaits the no-op, `task` starts an asyncio task for each message, `locks` also takes a mutex for each:
those of a batch are taken in one pipeline of SET NX PX, and given back by a script in another. `serial` runs one
message after another, each under its mutex.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Self
from uuid import uuid4

import msgpack
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ..meter import sample, tick
from .base import ALONE_SECONDS, NAP_SECONDS, Client, redis_url

_STREAM, _GROUP = "bench:stream", "bench:workers"
_BATCH = 100
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


async def noop(number: int) -> None:
    tick()


async def nap(number: int) -> None:
    tick()
    await asyncio.sleep(NAP_SECONDS)


async def clock(sent: float) -> None:
    sample(time.monotonic() - sent)


async def alone(number: int) -> None:
    tick()
    await asyncio.sleep(ALONE_SECONDS)


_BY_NAME: dict[str, Callable[[Any], Coroutine[Any, Any, None]]] = {
    "noop": noop,
    "nap": nap,
    "clock": clock,
    "mutex": noop,
    "alone": alone,
}


class _Client(Client):
    async def __aenter__(self) -> Self:
        self._redis = Redis.from_url(redis_url(), protocol=2)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._redis.aclose()

    async def submit(self, task: str, argument: Any) -> None:
        await self._redis.execute_command("XADD", _STREAM, "*", "data", _packed(task, argument))

    async def submit_many(self, task: str, arguments: Iterable[Any]) -> None:
        async with self._redis.pipeline(transaction=False) as pipe:
            for argument in arguments:
                pipe.execute_command("XADD", _STREAM, "*", "data", _packed(task, argument))
            await pipe.execute()


client = _Client


def _packed(task: str, argument: Any) -> bytes:
    packed: bytes = msgpack.packb({"task_id": uuid4().hex, "task_name": task, "task_args": [argument]})
    return packed


async def work(mode: str) -> None:
    redis = Redis.from_url(redis_url(), protocol=2)
    redis.response_callbacks.pop("XREADGROUP", None)  # its reply as it came is enough
    try:
        await redis.xgroup_create(_STREAM, _GROUP, "0", mkstream=True)
    except ResponseError as error:  # another worker has made it
        if "BUSYGROUP" not in str(error):
            raise
    release = await redis.script_load(_RELEASE)
    consumer = uuid4().hex
    fetch = ("XREADGROUP", "GROUP", _GROUP, consumer, "COUNT", _BATCH, "BLOCK", 1000, "STREAMS", _STREAM, ">")
    while True:
        reply: Any = await redis.execute_command(*fetch)
        if not reply:
            continue
        entries = reply[0][1]
        messages = [msgpack.unpackb(fields[1]) for _, fields in entries]
        if mode == "serial":
            for message in messages:
                await redis.set(_lock(message), message["task_id"], nx=True, px=30_000)
                await _BY_NAME[message["task_name"]](*message["task_args"])
                await redis.evalsha(release, 1, _lock(message), message["task_id"])
            await redis.xack(_STREAM, _GROUP, *(entry for entry, _ in entries))
            await redis.xdel(_STREAM, *(entry for entry, _ in entries))
            continue
        if mode == "locks":
            async with redis.pipeline(transaction=False) as pipe:
                for message in messages:
                    pipe.execute_command("SET", _lock(message), message["task_id"], "NX", "PX", 30_000)
                granted = await pipe.execute()
            assert all(granted)
        coroutines = [_BY_NAME[message["task_name"]](*message["task_args"]) for message in messages]
        if mode == "await":
            for coroutine in coroutines:
                await coroutine
        else:
            await asyncio.wait([asyncio.create_task(coroutine) for coroutine in coroutines])
        async with redis.pipeline(transaction=False) as pipe:
            if mode == "locks":
                for message in messages:
                    pipe.execute_command("EVALSHA", release, 1, _lock(message), message["task_id"])
            ids = [entry for entry, _ in entries]
            pipe.execute_command("XACK", _STREAM, _GROUP, *ids)
            pipe.execute_command("XDEL", _STREAM, *ids)
            await pipe.execute()


def _lock(message: dict[str, Any]) -> str:
    return f"bench:lock:{message['task_args'][0]}"


if __name__ == "__main__":
    import uvloop

    uvloop.run(work(sys.argv[1]))
