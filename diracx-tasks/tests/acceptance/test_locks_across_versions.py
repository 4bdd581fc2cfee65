"""Locks and limiters of the published package 0.7.0 and of ours on one server: what each refuses the other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Redis

from benchmarks.peers.environments import is_ready, prepare

PAIRS = [("0.7", "ours"), ("ours", "0.7")]
_ONE, _TWO = {"limit": 1}, {"limit": 2}
_EXCLUDING = [
    ("MutexLock", "MutexLock", {}),
    ("ExclusiveRWLock", "ExclusiveRWLock", {}),
    ("ExclusiveRWLock", "SharedRWLock", {}),
    ("SharedRWLock", "ExclusiveRWLock", {}),
    ("ConcurrencyLimiter", "ConcurrencyLimiter", _ONE),
]


@pytest.fixture(autouse=True, scope="module")
def _installed() -> None:
    if not is_ready("reference"):
        pytest.skip("the published package is not installed (`make servers` does it)")


class Holder:
    """A process of either version with locks, which are made as they are named."""

    def __init__(self, process: Process) -> None:
        self.process = process

    async def __call__(self, method: str, name: str, kind: str = "", /, **options: Any) -> Any:
        """Call `acquire`, `release` or `extend` of a lock."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([method, name, kind, options]).encode() + b"\n")
        return json.loads(await self.process.stdout.readline())


@pytest.fixture
async def holders(redis_url: str) -> AsyncIterator[dict[str, Holder]]:
    environment = {**os.environ, "DIRACX_TASKS_REDIS_URL": redis_url}
    programs = {"0.7": prepare("reference") / "bin/python", "ours": sys.executable}
    found = {
        version: Holder(
            await asyncio.create_subprocess_exec(program, "-c", _HOLDER, env=environment, stdin=PIPE, stdout=PIPE)
        )
        for version, program in programs.items()
    }
    for holder in found.values():
        await holder("release", "none", "MutexLock")  # imports take seconds
    yield found
    for holder in found.values():
        with contextlib.suppress(ProcessLookupError):
            holder.process.send_signal(signal.SIGKILL)
        await holder.process.wait()


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
async def test_what_one_version_holds_the_other_is_refused(
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
async def test_readers_of_both_versions_share_and_the_last_lets_the_writer_in(
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
async def test_what_is_renewed_is_kept_and_what_was_held_by_the_dead_ends(
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
    one.process.send_signal(signal.SIGKILL)
    async with asyncio.timeout(10):
        while not await other("acquire", "b"):
            await asyncio.sleep(0.02)
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
    async with asyncio.timeout(10):
        while not await holders[shorter]("acquire", "c", kind, **_TWO):  # the slot of "b" has ended
            await asyncio.sleep(0.02)
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


async def test_a_reader_of_0_7_that_has_died_keeps_writers_out_until_its_lock_is_deleted(
    holders: dict[str, Holder], redis: Redis
) -> None:
    assert await holders["0.7"]("acquire", "a", "SharedRWLock")
    holders["0.7"].process.send_signal(signal.SIGKILL)
    await holders["0.7"].process.wait()
    assert not await holders["ours"]("acquire", "writer", "ExclusiveRWLock")
    assert await redis.ttl("lock:rw:job:one") == -1
    await redis.delete("lock:rw:job:one")
    assert await holders["ours"]("acquire", "writer")
    await holders["ours"]("release", "writer")
