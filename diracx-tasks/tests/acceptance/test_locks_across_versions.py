"""Compatibility of locks and limiters with the published package 0.7.0 on one server."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from typing import IO, Any

import pytest
from redis.asyncio import Redis
from support.waiting import until
from support.warm_commands import WarmCommands

PAIRS = [("0.7", "ours"), ("ours", "0.7")]
_ONE, _TWO = {"limit": 1}, {"limit": 2}
_EXCLUDING = [
    ("MutexLock", "MutexLock", {}),
    ("ExclusiveRWLock", "ExclusiveRWLock", {}),
    ("ExclusiveRWLock", "SharedRWLock", {}),
    ("SharedRWLock", "ExclusiveRWLock", {}),
    ("ConcurrencyLimiter", "ConcurrencyLimiter", _ONE),
]


class Holder:
    """A process of either version with locks, which are made as they are named."""

    def __init__(self, commands: WarmCommands, redis_url: str) -> None:
        requests, self._requests = _pipe()
        self._responses, responses = _pipe()
        environment = {**os.environ, "DIRACX_TASKS_REDIS_URL": redis_url}
        with requests, responses, os.fdopen(os.dup(2), "wb") as errors:
            stdio = {"stdin": requests, "stdout": responses, "stderr": errors}
            self.process = commands.start(["python", "-c", _HOLDER], env=environment, **stdio)

    async def __call__(self, method: str, name: str, kind: str = "", /, **options: Any) -> Any:
        """Call `acquire`, `release` or `extend` of a lock."""
        return await asyncio.to_thread(self._call, [method, name, kind, options])

    def _call(self, request: list[Any]) -> Any:
        self._requests.write(json.dumps(request).encode() + b"\n")
        return json.loads(self._responses.readline())

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()
        self._requests.close()
        self._responses.close()


def _pipe() -> tuple[IO[bytes], IO[bytes]]:
    reader, writer = os.pipe()
    return os.fdopen(reader, "rb"), os.fdopen(writer, "wb", buffering=0)


@pytest.fixture
def holders(
    redis_url: str, warm_commands: WarmCommands, published_commands: WarmCommands
) -> Iterator[dict[str, Holder]]:
    """One of each version."""
    running = {"0.7": Holder(published_commands, redis_url), "ours": Holder(warm_commands, redis_url)}
    yield running
    for holder in running.values():
        holder.kill()


_HOLDER = """
import asyncio, json, os, sys
from diracx.tasks.plumbing import lock_registry, locks
from redis.asyncio import Redis

async def main():
    made, redis = {}, Redis.from_url(os.environ["DIRACX_TASKS_REDIS_URL"])
    for line in iter(sys.stdin.readline, ""):
        method, name, kind, options = json.loads(line)
        if name not in made:
            classed = {each: options.pop(each) for each in ("limit", "window_seconds") if each in options}
            cls = type(kind, (getattr(locks, kind),), classed)
            made[name] = cls(lock_registry.JOB, "one", **options)
        print(json.dumps(await getattr(made[name], method)(redis)), flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize(("held", "asked", "options"), _EXCLUDING, ids=str)
async def test_a_lock_held_by_one_version_is_refused_to_the_other(
    holders: dict[str, Holder], first: str, second: str, held: str, asked: str, options: dict[str, Any]
) -> None:
    one, other = holders[first], holders[second]
    assert await one("acquire", "a", held, **options)
    for _ in range(3):
        assert not await other("acquire", "b", asked, **options)
    await other("release", "b")
    assert not await other("acquire", "b"), "a release by who does not hold it changes nothing"
    await one("release", "a")
    assert await other("acquire", "b")
    assert not await one("acquire", "a")
    await other("release", "b")
    assert await one("acquire", "a")
    await one("release", "a")


@pytest.mark.parametrize(("first", "second"), PAIRS)
async def test_readers_of_both_versions_share_a_lock_and_its_last_release_admits_the_writer(
    holders: dict[str, Holder], redis: Redis, first: str, second: str
) -> None:
    one, other = holders[first], holders[second]
    assert await one("acquire", "a", "SharedRWLock")
    assert await other("acquire", "b", "SharedRWLock")
    await one("release", "a")
    for holder in (one, other):
        assert not await holder("acquire", "writer", "ExclusiveRWLock")
    await other("release", "b")
    assert not await redis.exists("lock:rw:job:one")
    assert await one("acquire", "writer")
    await one("release", "writer")


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("kind", ["MutexLock", "ExclusiveRWLock", "ConcurrencyLimiter"])
async def test_renewed_locks_are_kept_and_locks_of_dead_workers_expire(
    holders: dict[str, Holder], first: str, second: str, kind: str
) -> None:
    options = _ONE if kind == "ConcurrencyLimiter" else {}
    one, other = holders[first], holders[second]
    assert await one("acquire", "a", kind, ttl_ms=1500, **options)
    loop = asyncio.get_running_loop()
    kept = loop.time() + 3
    while loop.time() < kept:
        await one("extend", "a")  # 0.7 says False of a slot that it has renewed
        assert not await other("acquire", "b", kind, **options)
        await asyncio.sleep(0.1)
    one.kill()
    await until(lambda: other("acquire", "b"), seconds=10)
    assert loop.time() > kept + 1
    await other("release", "b")


@pytest.mark.parametrize("longer", ["0.7", "ours"])
async def test_a_slot_of_a_limiter_lasts_though_that_of_the_other_version_ends_sooner(
    holders: dict[str, Holder], redis: Redis, longer: str
) -> None:
    [shorter] = holders.keys() - {longer}
    kind = "ConcurrencyLimiter"
    assert await holders[shorter]("acquire", "b", kind, ttl_ms=300, **_TWO)
    assert await holders[longer]("acquire", "a", kind, ttl_ms=60_000, **_TWO)
    await holders[shorter]("release", "b")
    assert await holders[shorter]("acquire", "b")
    # The slot of "b" has ended.
    await until(lambda: holders[shorter]("acquire", "c", kind, **_TWO), seconds=10)
    assert not await holders[shorter]("acquire", "d", kind, **_TWO)
    await redis.delete("limiter:conc:job:one")


@pytest.mark.parametrize(("first", "second"), PAIRS)
async def test_each_version_counts_the_grants_of_its_own_rate_limiter(
    holders: dict[str, Holder], redis: Redis, first: str, second: str
) -> None:
    for version in (first, second):
        options = {"limit": 3, "window_seconds": 3600}
        for number in range(3):
            assert await holders[version]("acquire", f"rate {number}", "RateLimiter", **options)
        assert not await holders[version]("acquire", "rate 0")
    found = await redis.keys("limiter:rate:job:one*")
    assert len(found) == 2
    await redis.delete(*found)


async def test_a_lock_of_a_dead_reader_of_0_7_blocks_writers_until_it_is_deleted(
    holders: dict[str, Holder], redis: Redis
) -> None:
    assert await holders["0.7"]("acquire", "a", "SharedRWLock")
    holders["0.7"].kill()
    assert not await holders["ours"]("acquire", "writer", "ExclusiveRWLock")
    assert await redis.ttl("lock:rw:job:one") == -1
    await redis.delete("lock:rw:job:one")
    assert await holders["ours"]("acquire", "writer")
    await holders["ours"]("release", "writer")
