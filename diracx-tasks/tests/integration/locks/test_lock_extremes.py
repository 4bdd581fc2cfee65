"""Extreme keys, rates and clocks of locks, and a full server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest
from diracx.tasks.plumbing import (
    BaseLock,
    BaseTask,
    ExclusiveRWLock,
    MutexLock,
    RateLimiter,
    SharedRWLock,
    Size,
    schedule_many,
)
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.plumbing.broker.models import in_ms
from diracx.tasks.plumbing.callbacks import spawn_with_callback
from diracx.tasks.plumbing.exceptions import SendTaskError
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.retry_policies import ExponentialBackoff
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from redis.exceptions import ResponseError
from support.lines import Quota, Slots, Worker, grant_key, line_of, mutex, quota, reads, slot, writes
from support.waiting import until

pytestmark = pytest.mark.leaves_keys("diracx:tasks:*", "lock:*", "limiter:*")

HOUR_MS = 3_600_000

# --- keys ---------------------------------------------------------------------------------------------------

KINDS: list[Callable[[str], BaseLock]] = [
    lambda key: MutexLock(JOB, key, ttl_ms=600_000),
    lambda key: ExclusiveRWLock(JOB, key, ttl_ms=600_000),
    lambda key: Slots(JOB, key),
    lambda key: Quota(JOB, key),
]
NAMES = ["", " ", "{a}b", "a  b", "a\0b", "a\nb", "\r\n", "a:b", "%s%d%%", "\\n", "e\u0301\u2603", "k" * 10_000]


@pytest.mark.parametrize("kind", KINDS, ids=["mutex", "write", "slot", "rate"])
@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:9]))
async def test_a_line_works_for_any_key_of_its_lock(
    worker: Worker, redis: Redis, name: str, kind: Callable[[str], BaseLock]
) -> None:
    assert await kind(name).acquire(redis)
    first, second, third = await worker.park(3, lambda: kind(name))
    await worker.broker.cancel([first])
    assert await line_of(redis, kind(name)) == [second, third]
    for waits in (second, third):
        await redis.delete(kind(name).redis_key)
        if not await worker.granted():
            await worker.look(kind(name))
        assert await worker.step(lambda: [kind(name)]) == 1
        await worker.end(waits)
    assert worker.began == [second, third]
    assert not await redis.keys(keys.WAITING_PREFIX + "*")


@pytest.mark.parametrize("lock", [mutex, reads, writes, slot, quota])
async def test_a_lock_key_of_a_wrong_type_leaves_no_other_lock_held(
    worker: Worker, redis: Redis, lock: Callable[[], BaseLock]
) -> None:
    """Its line stands when that happens, and goes on when the key is repaired."""
    holder = writes() if lock is reads else lock()
    assert await holder.acquire(redis)
    names = await worker.park(2, lock)
    await redis.delete(holder.redis_key)
    await redis.rpush(holder.redis_key, "something else")
    await worker.submit("newcomer")
    with suppress(ResponseError):  # a worker makes a dead letter of it
        assert await worker.step(lambda: [SharedRWLock(JOB, "other"), lock()]) == 0
    assert not await redis.exists(SharedRWLock(JOB, "other").redis_key)
    await worker.look(lock())
    await redis.delete(holder.redis_key)
    await worker.look(lock())
    await worker.step(lambda: [lock()])
    assert worker.began[0] == names[0]


# --- two rates on one key -----------------------------------------------------------------------------------


async def test_limiters_of_different_windows_on_one_key_each_keep_their_own_limit(redis: Redis) -> None:
    class Wide(RateLimiter):
        limit = 3
        window_seconds = 600.0

    class Narrow(RateLimiter):
        limit = 100
        window_seconds = 0.001

    assert [await Wide(JOB, 1).acquire(redis) for _ in range(3)] == [True] * 3
    for _ in range(5):
        assert await Narrow(JOB, 1).acquire(redis)
        assert not await Wide(JOB, 1).acquire(redis)


# --- the server's clock is set back -------------------------------------------------------------------------


async def set_back(redis: Redis, by_ms: int) -> None:
    """Timestamps that were written lie so much further ahead."""
    for timers in (keys.LINES, keys.DELAYED):
        for name, due in await redis.zrange(timers, 0, -1, withscores=True):
            await redis.zadd(timers, {name: due + by_ms})
    for grant in await redis.keys(keys.RESERVATION_PREFIX + "*"):
        ends, _, rest = (await redis.get(grant)).partition(b" ")
        await redis.set(grant, b"%d %s" % (int(ends) + by_ms, rest), keepttl=True)
    for log in await redis.keys("limiter:rate:*"):
        for member, at in await redis.zrange(log, 0, -1, withscores=True):
            await redis.zadd(log, {member: at + by_ms * 1000})
        await redis.pexpire(log, await redis.pttl(log) + by_ms)


async def test_a_line_is_checked_soon_after_the_clock_was_set_back(worker: Worker, redis: Redis) -> None:
    assert await mutex().acquire(redis)
    waits, _ = await worker.park(2, mutex)
    await redis.delete(mutex().redis_key)
    await set_back(redis, HOUR_MS)
    await worker.broker.promote()
    assert await worker.granted() == [waits]
    [(_, due)] = await redis.zrange(keys.LINES, 0, -1, withscores=True)
    assert due < in_ms(datetime.now(UTC)) + 20_000


async def test_no_grant_lasts_longer_because_the_clock_was_set_back(
    worker: Worker, small: Worker, redis: Redis
) -> None:
    assert await mutex().acquire(redis)
    await small.park(1, mutex, "not fetched ")
    await worker.park(1, mutex)
    await redis.delete(mutex().redis_key)
    await worker.look(mutex())
    assert await redis.exists(grant_key(mutex(), "small"))
    await set_back(redis, HOUR_MS)
    await worker.look(mutex())
    assert await worker.step(lambda: [mutex()]) == 1


async def test_the_quota_is_available_after_a_window_though_the_clock_was_set_back(redis: Redis) -> None:
    class Brief(RateLimiter):
        limit = 2
        window_seconds = 2.0

    assert await Brief(JOB, 1, n_items=2).acquire(redis)
    await set_back(redis, HOUR_MS)
    assert not await Brief(JOB, 1).acquire(redis), "it may have been granted just now"
    await until(lambda: Brief(JOB, 1).acquire(redis))


# --- a full server ------------------------------------------------------------------------------------------

RAN: Counter[str] = Counter()


@dataclass
class Locked(BaseTask):
    name: str
    locks: list[str]
    retry_policy = ExponentialBackoff(base_delay_seconds=0.01)

    @property
    def execution_locks(self) -> list[BaseLock]:
        made: dict[str, Callable[[], BaseLock]] = {
            "mutex": lambda: MutexLock(JOB, "full"),
            "read": lambda: SharedRWLock(JOB, "full"),
            "write": lambda: ExclusiveRWLock(JOB, "full"),
            "slot": lambda: Slots(JOB, "full"),
        }
        return [made[lock]() for lock in self.locks]

    async def execute(self) -> str:
        RAN[self.name] += 1
        if RAN[self.name] == 1 and self.name.endswith("5"):
            raise OSError("the first time it fails")
        return self.name


class SmallLocked(Locked):
    size = Size.SMALL


async def test_queued_tasks_end_on_a_full_server_and_new_ones_are_refused(redis_url: str, redis: Redis) -> None:
    RAN.clear()
    mixes: list[list[str]] = [[], ["mutex"], ["read"], ["write"], ["slot"], ["mutex", "read"], ["slot", "write"]]
    made = [(Locked, SmallLocked)[n % 2](f"t{n}", mixes[n % len(mixes)]) for n in range(60)]
    holders: list[BaseLock] = [MutexLock(JOB, "full"), ExclusiveRWLock(JOB, "full"), Slots(JOB, "full")]
    for holder in holders:
        assert await holder.acquire(redis)
    async with TaskSystem([Locked, SmallLocked], redis_url=redis_url, scheduler=False) as system:
        await schedule_many(made)
        await spawn_with_callback([Locked(f"child{n}", ["slot"]) for n in range(5)], Locked("callback", ["mutex"]))
        await until(lambda: redis.hlen(keys.DELAYED_DATA), when=lambda found: found >= 40)  # these wait in lines
        await redis.config_set("maxmemory", "1")
        try:
            for holder in holders:
                await holder.release(redis)
            with pytest.raises(SendTaskError, match="maxmemory"):
                await Locked("refused", []).schedule()
            await system.drain()
            await until(lambda: "callback" in RAN)
            await system.drain()
        finally:
            await redis.config_set("maxmemory", "0")
        await Locked("afterwards", ["mutex", "write", "slot"]).schedule()
        await system.drain()
    ended = {task.name for task in made} | {f"child{n}" for n in range(5)} | {"callback", "afterwards"}
    assert set(RAN) == ended
    assert {name for name, times in RAN.items() if times > 1} == {name for name in ended if name.endswith("5")}, (
        "retries only"
    )
    assert not await redis.exists(keys.DELAYED, keys.LINES, *[holder.redis_key for holder in holders])
