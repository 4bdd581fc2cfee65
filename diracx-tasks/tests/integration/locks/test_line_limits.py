"""Lines of waiting tasks adapt to changed limits, and readers join readers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import pytest
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.plumbing.broker.models import in_ms
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock
from redis.asyncio import Redis
from support.lines import (
    BATCH,
    BOUNDED,
    LONG_AGO_MS,
    Counted,
    Quota,
    Worker,
    all_step,
    line_key,
    line_of,
    mutex,
    name_of,
    named,
    quota,
    reads,
    slot,
    waits_since,
    writes,
)

pytestmark = pytest.mark.leaves_keys("diracx:tasks:*", "lock:*", "limiter:*")


# --- limits that change, and who goes first -----------------------------------------------------------------


@pytest.mark.parametrize("lock", [slot, quota])
async def test_a_removed_limit_releases_the_whole_line_in_order(
    worker: Worker, redis: Redis, lock: Callable[[int], BaseLock]
) -> None:
    assert await lock(1).acquire(redis)
    names = await worker.park(49, lambda: lock(1))
    await worker.submit("newcomer")
    await worker.step(lambda: [lock(100)])
    assert worker.began == [], "it stands behind those that came before"
    await worker.all_steps(lambda: [lock(100)])
    assert worker.began == [*names, "newcomer"]


@pytest.mark.parametrize("lock", [slot, quota])
async def test_a_removed_limit_is_noticed_without_new_tasks(
    worker: Worker, redis: Redis, lock: Callable[[int], BaseLock]
) -> None:
    assert await lock(1).acquire(redis)
    names = await worker.park(49, lambda: lock(1))
    await worker.look(lock(1))
    await worker.all_steps(lambda: [lock(100)])
    assert worker.began == names


@pytest.mark.parametrize("lock", [slot, quota])
async def test_a_line_of_a_disabled_limiter_drains_in_batches(
    worker: Worker, redis: Redis, lock: Callable[[int], BaseLock]
) -> None:
    """New tasks acquire nothing, and start meanwhile."""
    assert await lock(1).acquire(redis)
    names = await worker.park(200, lambda: lock(1))
    await worker.look(lock(1))
    steps = 0
    while await worker.step(list):
        steps += 1
    assert worker.began == names
    assert steps <= len(names) / 10 + 1
    assert not await redis.exists(keys.LINES, line_key(lock(1)))


async def test_a_task_that_still_has_a_limit_waits_in_line_though_others_have_none(
    worker: Worker, redis: Redis
) -> None:
    assert await slot().acquire(redis)
    names = await worker.park(50, slot)
    await worker.look(slot())
    assert await worker.step(list) == 1
    async with Counted(redis) as counted:
        await worker.all_steps(lambda: [slot()])
    assert worker.began == names[:1]
    assert await line_of(redis, slot()) == names[1:]
    assert counted.commands < BOUNDED


@pytest.mark.parametrize("lock", [mutex, writes, slot, quota])
async def test_new_tasks_do_not_overtake_a_line_for_a_free_lock(
    worker: Worker, redis: Redis, lock: Callable[[], BaseLock]
) -> None:
    assert await lock().acquire(redis)
    first, second = await worker.park(2, lock)
    await redis.delete(lock().redis_key)  # it has expired, and the timer has not looked yet
    await worker.submit("newcomer")
    assert await worker.step(lambda: [lock()]) == 0
    assert await worker.step(lambda: [lock()]) == 1
    assert worker.began == [first]
    assert await line_of(redis, lock()) == [second, "newcomer"]


async def test_readers_behind_a_writer_join_the_readers_that_new_tasks_join(worker: Worker, redis: Redis) -> None:
    async def begins(name: str, lock: Callable[[], BaseLock]) -> int:
        await worker.submit(name)
        return await worker.step(lambda: [lock()])

    assert await begins("writer", writes) == 1
    for name, lock in [("reader", reads), ("next writer", writes), ("last reader", reads)]:
        assert await begins(name, lock) == 0
    await worker.end("writer")
    assert await worker.step(lambda: [reads()]) == 1
    due = await redis.zscore(keys.LINES, reads().redis_key)
    assert await begins("newcomer", reads) == 1
    assert await redis.zscore(keys.LINES, reads().redis_key) == due, "newcomers do not put the timer off"
    await worker.end("reader")

    await worker.look(reads())
    assert await worker.step(lambda: [reads()]) == 1
    assert worker.began == ["writer", "reader", "newcomer", "last reader"]
    assert await line_of(redis, reads()) == ["next writer"]
    await worker.end("newcomer")
    assert await worker.granted() == ["last reader"], "it holds the lock"
    await worker.end("last reader")
    assert await worker.granted() == ["next writer"]


async def test_readers_far_behind_writers_join_the_readers_that_have_the_lock(
    worker: Worker, redis: Redis
) -> None:
    """The timer checks another part of the line each time."""
    assert await writes().acquire(redis)
    await worker.park(700, writes, "writer")
    readers = await worker.park(3, reads, "reader")
    await worker.park(700, writes, "x writer")
    await redis.delete(reads().redis_key)
    assert await reads().acquire(redis)
    for _ in range(200):  # each has a chance of one in three
        await worker.look(reads())
        await worker.step(lambda: [reads()])
        if len(worker.began) == len(readers):
            break
    assert sorted(worker.began) == readers
    due = await redis.zscore(keys.LINES, reads().redis_key)
    assert due is not None
    assert due < in_ms(datetime.now(UTC)) + 5_000, "it looks again soon"


async def test_limiters_with_different_limits_converge(worker: Worker, redis: Redis) -> None:
    """Each would let the other go, and be refused itself: that must not go on for ever."""
    limits = {"strict": 1, "lax": 10}
    assert await slot().acquire(redis)
    for name in ("strict", "lax"):
        await worker.submit(name)
        deliveries, _ = await worker.broker.fetch(BATCH)
        await worker.start(deliveries, lambda name=name: [slot(limits[name])])  # type: ignore[misc]
    for _ in range(10):
        deliveries, _ = await worker.broker.fetch(BATCH)
        for each in deliveries:
            await worker.start([each], lambda each=each: [slot(limits[name_of(each)])])  # type: ignore[misc]
    assert await worker.granted() == []


@pytest.mark.parametrize("order", ["qb", "bq"])
async def test_a_task_of_a_rate_limiter_and_a_lock_does_not_starve(
    worker: Worker, redis: Redis, order: str
) -> None:
    quota = Quota(JOB, "q")
    locks: dict[str, Callable[[], BaseLock]] = {"q": lambda: Quota(JOB, "q"), "b": lambda: named("b")}
    needs: dict[str, Callable[[], Sequence[BaseLock]]] = {
        "q": lambda: [locks["q"]()],
        "b": lambda: [locks["b"]()],
        "both": lambda: [locks[name]() for name in order],
    }
    await worker.submit("q-0", "b-0")
    await all_step(worker, needs)
    await waits_since(worker, "both-0", LONG_AGO_MS, needs["both"])
    for number in range(1, 10):
        await worker.submit(f"q-{number}", f"b-{number}")
        await all_step(worker, needs)
        for name in [each for each in worker.running if each != "both-0"]:
            await worker.end(name)
            await all_step(worker, needs)
        await redis.delete(quota.redis_key)  # its window is over
        await worker.look(quota)
        await all_step(worker, needs)
        if "both-0" in worker.began:
            break
    assert worker.began.index("both-0") - 2 <= 4
