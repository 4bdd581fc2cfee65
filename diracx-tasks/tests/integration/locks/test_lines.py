"""Lines of tasks that wait for a lock: no polling, no starvation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest
from diracx.tasks.plumbing import (
    BaseTask,
    MutexLock,
)
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.plumbing.broker.models import Delivery, Settlement, in_ms
from diracx.tasks.plumbing.broker.replies import ACCEPTED
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from support.lines import (
    BATCH,
    QUEUE,
    Worker,
    grant_key,
    line_key,
    line_of,
    mutex,
    name_of,
    quota,
    reads,
    slot,
    writes,
)
from support.waiting import until

pytestmark = pytest.mark.leaves_keys("diracx:tasks:*", "lock:*", "limiter:*")


# --- who leaves a line --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lock", [mutex, writes, slot, quota])
async def test_a_cancelled_task_leaves_its_line(
    worker: Worker, redis: Redis, lock: Callable[[], BaseLock]
) -> None:
    assert await lock().acquire(redis)
    first, second, third = await worker.park(3, lock)
    await worker.broker.cancel([first, second])
    assert await line_of(redis, lock()) == [third]
    await worker.broker.cancel([third])
    assert not await redis.exists(line_key(lock()), keys.LINES, keys.DELAYED)


async def test_readers_begin_when_the_writer_before_them_is_cancelled(worker: Worker, redis: Redis) -> None:
    assert await writes().acquire(redis)
    await worker.submit("writes")
    assert await worker.step(lambda: [writes()]) == 0
    await worker.park(2, reads)
    await redis.delete(reads().redis_key)
    assert await reads().acquire(redis)
    await worker.broker.cancel(["writes"])
    async with asyncio.timeout(5):
        while len(worker.began) < 2:
            await worker.broker.promote()  # at once: the line is due
            await worker.step(lambda: [reads()])


# --- every end hands on -------------------------------------------------------------------------------------

ENDS: dict[str, Callable[[Delivery], Settlement]] = {
    "rejected": lambda d: Settlement(d, dead={"reason": "unknown_task", "data": b"a dead letter"}),
    "rejected, the dead letter in the database": Settlement,
    "cancelled": lambda d: Settlement(d, result={"key": "diracx:results:t", "value": b"", "ttl_ms": 1000}),
    "a child of a group": lambda d: Settlement(d, group={"id": "g", "child": "t000000", "error": "rejected"}),
    "to be tried later": lambda d: Settlement(
        d, retry={"task": "t000000", "delay_ms": 600_000, "stream": QUEUE, "data": d.data}
    ),
    "with another lock only": lambda d: Settlement(d, locks=[MutexLock(JOB, "other").spec()]),
}


@pytest.mark.parametrize("lock", [mutex, slot, writes])
@pytest.mark.parametrize("end", ENDS)
async def test_a_granted_task_that_ends_without_the_lock_passes_the_grant_to_the_next(
    worker: Worker, redis: Redis, end: str, lock: Callable[[], BaseLock]
) -> None:
    holder = lock()
    assert await holder.acquire(redis)
    first, second = await worker.park(2, lock)
    await holder.release(redis)
    [delivery], _ = await worker.broker.fetch(BATCH)
    assert (name_of(delivery), await line_of(redis, lock())) == (first, [second])
    assert await worker.broker.settle([ENDS[end](delivery)]) == [ACCEPTED]
    assert await worker.granted() == [second]


@pytest.mark.parametrize("lock", [mutex, slot, quota])
async def test_a_line_whose_tasks_need_the_lock_no_longer_drains_immediately(
    worker: Worker, redis: Redis, lock: Callable[[], BaseLock]
) -> None:
    assert await lock().acquire(redis)
    names = await worker.park(50, lock)
    await redis.delete(lock().redis_key)
    await worker.look(lock())
    await worker.all_steps(list)
    assert worker.began == names


async def test_a_worker_acquires_a_granted_lock_for_a_task_that_needs_it_no_longer(
    redis_url: str, redis: Redis
) -> None:
    needed, hold = [True], asyncio.Event()
    begun: list[int] = []

    @dataclass
    class Needs(BaseTask):
        number: int

        @property
        def execution_locks(self) -> list[BaseLock]:
            return [mutex()] if needed else []

        async def execute(self) -> None:
            begun.append(self.number)
            await hold.wait()

    holder = mutex()
    assert await holder.acquire(redis)
    async with TaskSystem([Needs], redis_url=redis_url, settings={"lock_retry_seconds": 600.0}) as system:
        for number in range(5):
            await Needs(number).schedule()
        await until(lambda: redis.zcard(keys.DELAYED), when=lambda found: found >= 5)
        needed.clear()
        before = await redis.info("commandstats")
        await holder.release(redis)
        await until(lambda: len(begun) >= 5, seconds=30)
        expired_grants = (await redis.info("commandstats"))["cmdstat_pttl"]["calls"] - before.get(
            "cmdstat_pttl", {"calls": 0}
        )["calls"]
        assert expired_grants < 20, "each waited for the grant of the one before to expire"
        hold.set()
        await system.drain()


async def test_a_grant_of_a_dead_worker_is_passed_to_the_next_waiter(worker: Worker, redis: Redis) -> None:
    holder = mutex()
    assert await holder.acquire(redis)
    _, second = await worker.park(2, mutex)
    await holder.release(redis)
    [_], _ = await worker.broker.fetch(BATCH)  # and its worker is killed
    due_ms = await redis.zscore(keys.LINES, mutex().redis_key)
    seconds, us = await redis.time()
    assert due_ms is not None
    assert due_ms - (seconds * 1000 + us / 1000) < 1_100
    await worker.grant_expires(mutex())
    await worker.look(mutex())
    assert [name_of(each) for each in (await worker.broker.fetch(BATCH))[0]] == [second]


# --- those whom no worker takes -----------------------------------------------------------------------------


@pytest.mark.parametrize("lock", [mutex, writes, reads, slot, quota])
@pytest.mark.parametrize("before", [3, 1_000])
async def test_a_task_that_can_run_waits_for_one_grant_however_many_without_a_worker_stand_before_it(
    worker: Worker, small: Worker, redis: Redis, lock: Callable[[], BaseLock], before: int
) -> None:
    holds = writes if lock is reads else lock
    assert await holds().acquire(redis)
    await small.park(before, lock, "not fetched ")
    names = await worker.park(5, lock)
    await redis.delete(lock().redis_key)
    await worker.look(lock())
    if lock is reads and before == 3:
        assert await worker.step(lambda: [lock()]) == 5, "they read beside each other"
        return
    assert await worker.step(lambda: [lock()]) == 0, "they are first, and have the grant"
    await small.grant_expires(lock(), "small")
    for name in names:  # from now on no grant is lost
        if name not in worker.began:
            await worker.look(lock())
            await worker.step(lambda: [lock()])
        assert name in worker.began
        if lock is quota:
            await redis.delete(quota().redis_key)
        else:
            await worker.end(name)
    assert worker.began == names
    taken = await redis.xlen("diracx:tasks:normal:small:handover")
    # Of readers one call resumes 50, fewer where messages are larger; else one stands for all of its size.
    assert taken in (range(40, 51) if lock is reads else (1,))


@pytest.mark.parametrize("lock", [mutex, writes, slot])
async def test_a_release_grants_the_first_task_that_a_worker_takes(
    worker: Worker, small: Worker, redis: Redis, lock: Callable[[], BaseLock]
) -> None:
    await worker.submit("holder")
    assert await worker.step(lambda: [lock()]) == 1
    await small.park(100, lock, "not fetched ")
    names = await worker.park(20, lock)
    await worker.end("holder")
    await small.grant_expires(lock(), "small")
    await worker.look(lock())
    for name in names:
        assert await worker.step(lambda: [lock()]) == 1
        await worker.end(name)
    assert worker.began == ["holder", *names]


async def test_a_line_advances_while_grants_of_other_lines_are_not_taken(
    worker: Worker, small: Worker, redis: Redis
) -> None:
    def other(number: int) -> BaseLock:
        return MutexLock(JOB, f"other{number}", ttl_ms=600_000)

    others = [other(number) for number in range(600)]
    for number, held in enumerate(others):
        assert await held.acquire(redis)
        await small.park(1, lambda number=number: other(number), f"other{number} ")  # type: ignore[misc]
    assert await mutex().acquire(redis)
    await small.park(1, mutex, "not fetched ")
    for held in others:
        await held.release(redis)
    assert await redis.xlen("diracx:tasks:normal:small:handover") == 600
    [second] = await worker.park(1, mutex)
    await redis.delete(mutex().redis_key)
    await worker.look(mutex())
    await small.grant_expires(mutex(), "small")
    await worker.look(mutex())
    assert await worker.step(lambda: [mutex()]) == 1
    assert (worker.began, await line_of(redis, mutex(), "small")) == ([second], [])


async def test_a_task_that_was_passed_over_has_its_place_again_when_a_worker_takes_it(
    worker: Worker, small: Worker, redis: Redis
) -> None:
    await worker.submit("holder")
    assert await worker.step(lambda: [mutex()]) == 1
    early = await small.park(3, mutex, "small ")
    names = await worker.park(3, mutex)
    await worker.end("holder")
    await small.grant_expires(mutex(), "small")
    await worker.look(mutex())
    assert await worker.step(lambda: [mutex()]) == 1
    assert await small.step(lambda: [mutex()]) == 0, "its grant has expired, and another has the lock"
    assert await line_of(redis, mutex(), "small") == early
    await worker.end(names[0])
    for name in early:
        assert await small.step(lambda: [mutex()]) == 1
        await small.end(name)
    for name in names[1:]:
        assert await worker.step(lambda: [mutex()]) == 1
        await worker.end(name)
    assert (small.began, worker.began) == (early, ["holder", *names])


async def test_a_late_task_is_not_refused_because_of_tasks_that_no_worker_takes(
    worker: Worker, small: Worker, redis: Redis
) -> None:
    assert await mutex().acquire(redis)
    await small.park(3, mutex, "not fetched ")
    await worker.park(1, mutex)
    await redis.delete(mutex().redis_key)
    for who, size in ((small, "small"), (worker, "medium")):
        await worker.look(mutex())
        await who.grant_expires(mutex(), size)
    assert await worker.step(lambda: [mutex()]) == 1


async def test_more_urgent_tasks_have_a_grant_of_their_own_before_they_are_passed_over(
    worker: Worker, small: Worker, redis: Redis
) -> None:
    assert await mutex().acquire(redis)
    await small.park(2, mutex, "not fetched ")
    [waits] = await worker.park(1, mutex)
    await redis.delete(mutex().redis_key)
    await worker.look(mutex())
    await small.grant_expires(mutex(), "small")
    assert await mutex().acquire(redis)
    await small.submit("urgent", priority="realtime")
    assert (await small.broker.fetch(1))[0][0].priority == "realtime"
    await small.broker.fetch_unacknowledged([])
    deliveries = await small.broker.fetch_unacknowledged([])
    assert await small.start(deliveries, lambda: [mutex()]) == 0
    assert await line_of(redis, mutex(), "small") == ["urgent", "not fetched 000001"]
    await redis.delete(mutex().redis_key)
    await worker.look(mutex())
    assert await redis.xlen("diracx:tasks:realtime:small:handover") == 1
    await small.grant_expires(mutex(), "small")
    await worker.look(mutex())
    assert await worker.step(lambda: [mutex()]) == 1
    assert worker.began == [waits]


# --- data of earlier versions -------------------------------------------------------------------------------


@pytest.mark.parametrize("lock", [mutex, reads, slot])
@pytest.mark.parametrize("key_of", [line_key, grant_key, lambda _: keys.LINES], ids=["line", "grant", "timers"])
async def test_a_key_of_another_type_in_the_place_of_a_line_delays_its_tasks_at_most(
    worker: Worker, redis: Redis, key_of: Callable[[BaseLock], str], lock: Callable[[], BaseLock]
) -> None:
    holds = writes if lock is reads else lock
    await worker.submit("first")
    assert await worker.step(lambda: [holds()]) == 1
    await redis.rpush(key_of(lock()), "something else")
    await worker.submit("second")
    assert await worker.step(lambda: [lock()]) == 0
    await worker.end("first")
    if not await worker.granted():
        due = await redis.zscore(keys.DELAYED, "second")
        assert due < in_ms(datetime.now(UTC)) + 700_000, "it asks again by itself"
        await redis.zadd(keys.DELAYED, {"second": 0})
        await worker.broker.promote()
    assert await worker.step(lambda: [lock()]) == 1
    await worker.submit("third")
    assert await worker.step(lambda: [lock()]) == (lock is reads)


async def test_tasks_that_an_earlier_version_has_parked_wait_on_in_line(worker: Worker, redis: Redis) -> None:
    assert await mutex().acquire(redis)
    names = await worker.park(3, mutex)
    await redis.rename(line_key(mutex()), keys.WAITING_PREFIX + mutex().redis_key)
    await redis.pexpire(keys.WAITING_PREFIX + mutex().redis_key, 20_000)
    await redis.delete(keys.LINES)
    await redis.zadd(keys.DELAYED, dict.fromkeys(names, 0))
    await worker.broker.promote()
    assert await worker.step(lambda: [mutex()]) == 0
    assert await line_of(redis, mutex()) == names
    assert await redis.zscore(keys.LINES, mutex().redis_key) is not None


async def test_a_line_without_waiting_tasks_leaves_no_keys(worker: Worker, redis: Redis) -> None:
    holder = mutex()
    assert await holder.acquire(redis)
    await worker.park(120, mutex)
    await redis.delete(keys.DELAYED, keys.DELAYED_DATA, keys.DELAYED_REASONS)
    await holder.release(redis)
    async with asyncio.timeout(5):
        while await redis.exists(line_key(mutex()), keys.LINES):
            await worker.broker.promote()
