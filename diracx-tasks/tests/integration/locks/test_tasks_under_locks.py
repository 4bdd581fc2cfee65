"""Tasks with locks and limiters, from submission to end: order, renewal and grants."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import ClassVar

import pytest
from diracx.tasks.plumbing import (
    BaseTask,
    ConcurrencyLimiter,
    MutexLock,
    RateLimiter,
    SharedRWLock,
    schedule_many,
)
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from support.standard_tasks import SEEN
from support.waiting import until, until_renewed

pytestmark = pytest.mark.event_loops("asyncio", "uvloop")


# --- locks -----------------------------------------------------------------------------------------------


@dataclass
class Alone(BaseTask):
    number: int

    inside: ClassVar[int] = 0
    most: ClassVar[int] = 0

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(JOB, "alone")]

    async def execute(self) -> None:
        Alone.inside += 1
        Alone.most = max(Alone.most, Alone.inside)
        await asyncio.sleep(0)
        SEEN.append(self.number)
        Alone.inside -= 1


@pytest.mark.parametrize("workers", [1, 2])
async def test_P25_waiters_of_a_lock_are_served_in_the_order_they_came(redis_url: str, workers: int) -> None:
    Alone.most = 0
    async with TaskSystem([Alone], redis_url=redis_url, workers=workers) as system:
        await schedule_many([Alone(number) for number in range(40)])
        await system.drain()
    assert Alone.most == 1
    assert len(SEEN) == 40
    # The first that a second worker fetched may be faster than the first of the first; there is no line yet.
    early = [number for position, number in enumerate(SEEN) if number > position]
    assert len(early) <= workers - 1, SEEN
    assert sorted(set(SEEN) - set(early)) == [number for number in SEEN if number not in early]


async def test_P25_200_tasks_of_one_mutex_take_at_most_three_times_as_long_as_one_after_another(
    redis_url: str,
) -> None:
    @dataclass
    class Held(BaseTask):
        number: int

        @property
        def execution_locks(self) -> list[BaseLock]:
            return [MutexLock(JOB, "held")]

        async def execute(self) -> None:
            await asyncio.sleep(0.005)

    tasks = [Held(number) for number in range(200)]
    ratios = []
    async with TaskSystem([Held], redis_url=redis_url, concurrency=50) as system:
        for _ in range(3):  # the machine may turn to something else during one of the two
            begun = time.monotonic()
            await schedule_many(tasks)
            await system.drain(60)
            drained = time.monotonic() - begun
            begun = time.monotonic()
            for task in tasks:
                [lock] = task.execution_locks
                await lock.acquire(system.broker.redis)
                await task.execute()
                await lock.release(system.broker.redis)
            ratios.append(drained / (time.monotonic() - begun))
            if ratios[-1] <= 3:
                break
    assert min(ratios) <= 3


async def test_P23_refused_lock_spends_no_quota(redis_url: str, redis: Redis) -> None:
    class Limited(RateLimiter):
        limit = 5
        window_seconds = 600.0

    class Both(BaseTask):
        @property
        def execution_locks(self) -> list[BaseLock]:
            return [Limited(JOB, "quota"), MutexLock(JOB, "held")]

        async def execute(self) -> None:
            SEEN.append(1)

    held = MutexLock(JOB, "held")
    assert await held.acquire(redis)
    async with TaskSystem([Both], redis_url=redis_url) as system:
        await Both().schedule()
        await until(lambda: redis.exists(keys.DELAYED))
        assert not await redis.exists("limiter:rate:job:quota")
        await held.release(redis)
        await system.drain()
    assert SEEN == [1]
    assert await redis.zcard("limiter:rate:job:quota") == 1


async def test_a_held_lock_outlives_its_ttl_while_the_task_runs(redis_url: str, redis: Redis) -> None:
    gate = asyncio.Event()
    kept = MutexLock(JOB, "kept", ttl_ms=1500)

    class Holder(BaseTask):
        @property
        def execution_locks(self) -> list[BaseLock]:
            return [kept, SharedRWLock(JOB, "read")]

        async def execute(self) -> str:
            SEEN.append(1)
            await gate.wait()
            return "done"

    async with TaskSystem([Holder], redis_url=redis_url) as system:
        task_id = await Holder().schedule()
        await until(lambda: SEEN)
        await until_renewed(redis, kept.redis_key, 1500)  # a third of its time to live passes before each
        assert not await MutexLock(JOB, "kept").acquire(redis)
        gate.set()
        assert (await system.result(task_id)).return_value == "done"
        await system.drain()
        assert not await redis.exists("lock:rw:job:read")


async def test_P26_a_task_that_could_never_be_granted_is_refused_when_submitted(
    redis_url: str, redis: Redis
) -> None:
    class Small(RateLimiter):
        limit = 2
        window_seconds = 1.0

    class Greedy(BaseTask):
        @property
        def execution_locks(self) -> list[BaseLock]:
            return [Small(JOB, 1, n_items=3)]

        async def execute(self) -> None: ...

    async with TaskSystem([Greedy], redis_url=redis_url, workers=0):
        with pytest.raises(ValueError, match=r"n_items=3, more than its limit of 2"):
            await Greedy().schedule()
    assert await redis.keys("diracx:tasks:*:*") == []


async def test_a_refused_rate_limit_makes_the_task_wait_until_there_is_quota(redis_url: str) -> None:
    class Slow(RateLimiter):
        limit = 2
        window_seconds = 0.3

    @dataclass
    class Limited(BaseTask):
        number: int

        @property
        def execution_locks(self) -> list[BaseLock]:
            return [Slow(JOB, "slow")]

        async def execute(self) -> None:
            SEEN.append((asyncio.get_running_loop().time(), self.number))

    async with TaskSystem([Limited], redis_url=redis_url, workers=1) as system:
        await schedule_many([Limited(number) for number in range(8)])
        await system.drain()
    assert [number for _, number in SEEN] == list(range(8)), "first come, first served"
    started = [at for at, _ in SEEN]
    assert all(third - first > 0.25 for first, third in zip(started, started[2:], strict=False))
    assert started[-1] - started[0] < 1.5, "three windows, and not a whole one more for each refusal"


async def test_a_granted_lock_that_its_task_does_not_take_passes_to_the_next_task(
    redis_url: str, redis: Redis
) -> None:
    """It was granted one of its locks and refused another; the next in line for the first must not wait longer."""

    class One(ConcurrencyLimiter):
        limit = 1

    @dataclass
    class Needs(BaseTask):
        name: str
        mutexes: list[str]
        slot: bool

        @property
        def execution_locks(self) -> list[BaseLock]:
            limiters: list[BaseLock] = [One(JOB, "slot")] if self.slot else []
            return [*limiters, *(MutexLock(JOB, mutex) for mutex in self.mutexes)]

        async def execute(self) -> None:
            SEEN.append(self.name)

    async def parked(number: int) -> None:
        await until(lambda: redis.zcard(keys.DELAYED), when=lambda found: found >= number)

    holders = {name: MutexLock(JOB, name) for name in ("a", "b")}
    slot = One(JOB, "slot")
    for lock in (*holders.values(), slot):
        assert await lock.acquire(redis)
    settings = {"lock_retry_seconds": 60.0}
    async with TaskSystem([Needs], redis_url=redis_url, settings=settings) as system:
        await Needs("first", ["b"], True).schedule()
        await parked(1)
        await Needs("second", [], True).schedule()
        await parked(2)
        await Needs("third", ["a", "b"], False).schedule()
        await parked(3)
        await Needs("fourth", ["a"], False).schedule()
        await parked(4)
        await slot.release(redis)  # wakes the first, which is refused by b
        await holders["a"].release(redis)  # wakes the third, which is refused by b
        await until(lambda: {"second", "fourth"} <= set(SEEN))
        assert set(SEEN) == {"second", "fourth"}
        await holders["b"].release(redis)
        await system.drain()
    assert sorted(SEEN) == ["first", "fourth", "second", "third"]
