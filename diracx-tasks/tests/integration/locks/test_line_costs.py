"""Bounded work of each step of a line of waiting tasks, and no costs of an idle one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from diracx.tasks.plumbing import (
    MutexLock,
)
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys, scripts
from diracx.tasks.plumbing.broker.models import Settlement
from diracx.tasks.plumbing.broker.replies import ACCEPTED
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock
from redis.asyncio import Redis
from support.lines import BATCH, BOUNDED, Counted, Worker, line_of, mutex, quota, reads, slot, writes

pytestmark = pytest.mark.leaves_keys("diracx:tasks:*", "lock:*", "limiter:*")


# --- what waiting costs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lock", [mutex, writes, slot, quota])
async def test_a_grant_costs_the_same_for_any_length_of_the_line(
    worker: Worker, redis: Redis, lock: Callable[[], BaseLock]
) -> None:
    costs = []
    for length in (20, 2_000):
        await redis.flushall()
        await worker.submit("holder")
        assert await worker.step(lambda: [lock()]) == 1
        await worker.park(length, lock)
        counted = Counted(redis)
        async with counted:
            for _ in range(10):
                await worker.end(worker.began[-1])
                if lock is quota:
                    await redis.delete(quota().redis_key)
                    await worker.look(quota())
                assert await worker.step(lambda: [lock()]) == 1
        costs.append(counted.commands)
    assert costs[1] <= costs[0] + 5, "a ZADD more or less, where the timer was earlier"
    assert costs[0] < 10 * 100


async def test_an_unchanged_line_is_checked_by_one_timer_and_no_commands_of_its_own(
    worker: Worker, redis: Redis
) -> None:
    assert await mutex().acquire(redis)
    await worker.park(1_000, mutex)
    await redis.zadd(keys.LINES, {mutex().redis_key: 0})
    counted = Counted(redis)
    async with counted:
        for _ in range(10):
            again_ms = await worker.broker.promote()
    assert again_ms is not None
    assert again_ms > 9_000, "looked at again by one timer for all"
    assert counted.commands < 100
    assert await worker.granted() == []


@pytest.mark.parametrize("gone", ["cancelled by others", "readers"])
async def test_a_release_does_bounded_work_and_the_rest_is_done_later(
    worker: Worker, redis: Redis, gone: str
) -> None:
    holder = writes()
    assert await holder.acquire(redis)
    names = await worker.park(1_000, reads if gone == "readers" else writes)
    if gone != "readers":
        await redis.hdel(keys.DELAYED_DATA, *names[:-1])
        await redis.zrem(keys.DELAYED, *names[:-1])
    counted = Counted(redis)
    async with counted:
        await holder.release(redis)
    assert counted.commands < BOUNDED
    assert len(await worker.granted()) <= 50
    async with asyncio.timeout(60):
        while len(worker.began) < (1_000 if gone == "readers" else 1):
            async with counted:
                await worker.broker.promote()
                await worker.step(lambda: [reads() if gone == "readers" else writes()])
    assert worker.began == (names if gone == "readers" else names[-1:])


async def test_one_call_that_releases_many_locks_does_bounded_work(worker: Worker, redis: Redis) -> None:
    locks = [MutexLock(JOB, f"m{number}", ttl_ms=600_000) for number in range(400)]
    await worker.submit(*(f"holds{number}" for number in range(400)))
    given = iter(locks)
    deliveries, _ = await worker.broker.fetch(BATCH)
    for delivery in deliveries:
        assert await worker.start([delivery], lambda: [next(given)]) == 1
    wanted = iter([MutexLock(JOB, f"m{number}", ttl_ms=600_000) for number in range(400)])
    await worker.submit(*(f"waits{number}" for number in range(400)))
    for delivery in (await worker.broker.fetch(BATCH))[0]:
        assert await worker.start([delivery], lambda: [next(wanted)]) == 0
    settlements = [Settlement(each.delivery, locks=each.locks) for each in worker.running.values()]
    assert await scripts.settle(redis, "a", settlements) == [ACCEPTED] * 400
    assert len(await worker.granted()) <= 50
    async with asyncio.timeout(60):
        while len(await worker.granted()) < 400:
            await worker.broker.promote()


async def test_thousands_of_unknown_locks_are_released_in_batches(worker: Worker, redis: Redis) -> None:
    held = keys.HELD_PREFIX + "a"

    async def hold(number: int) -> None:
        locks = [f"lock:mutex:job:{name}" for name in range(number)]
        await redis.mset(dict.fromkeys(locks, "o"))
        await redis.hset(held, mapping={f"o:{lock}": "mutex " for lock in locks})

    await hold(9_000)
    assert await worker.broker.fetch_unacknowledged([], []) == []
    assert not await redis.exists(held)
    await hold(1_000)
    async with Counted(redis) as leaving:
        assert not await worker.broker.leave(), "others give them back, as those of the dead"
    assert leaving.commands < BOUNDED
    reclaiming = RedisStreamBroker(worker.broker.url, consumer_name="b")
    for _ in range(7):
        await reclaiming.reclaim(1)
    await reclaiming.shutdown()
    assert not await redis.keys("lock:mutex:*")


async def test_a_lowered_limit_is_enforced_and_each_release_costs_one_check(worker: Worker, redis: Redis) -> None:
    await worker.submit(*"abcd")
    assert await worker.step(lambda: [slot(4)]) == 4
    names = await worker.park(5, lambda: slot(1))
    for name in "abc":
        await worker.end(name)
        await worker.all_steps(lambda: [slot(1)])
    assert worker.began == [*"abcd"]
    await worker.end("d")
    await worker.all_steps(lambda: [slot(1)])
    assert worker.began == [*"abcd", names[0]]
    assert await line_of(redis, slot()) == names[1:]
