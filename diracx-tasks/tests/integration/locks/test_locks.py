"""The five kinds of locks on a real server, each on a single connection."""

from __future__ import annotations

import asyncio
import time

import pytest
from diracx.tasks.plumbing.broker import locking
from diracx.tasks.plumbing.lock_registry import JOB, TASK, LockedObjectType
from diracx.tasks.plumbing.locks import (
    BaseLock,
    ConcurrencyLimiter,
    ExclusiveRWLock,
    MutexLock,
    RateLimiter,
    SharedRWLock,
)
from redis.asyncio import Redis
from support.waiting import until

pytestmark = pytest.mark.event_loops("asyncio", "uvloop")


class Ten(RateLimiter):
    limit = 10
    window_seconds = 0.5


class Two(ConcurrencyLimiter):
    limit = 2


@pytest.mark.parametrize(
    ("lock", "key"),
    [
        (MutexLock(TASK, "MyTask", "lhcb"), "lock:mutex:task:MyTask:lhcb"),
        (MutexLock(JOB, 12), "lock:mutex:job:12"),
        (ExclusiveRWLock(JOB, 12), "lock:rw:job:12"),
        (SharedRWLock(JOB, 12), "lock:rw:job:12"),
        (RateLimiter(TASK, "MyTask"), "limiter:rate:task:MyTask"),
        (ConcurrencyLimiter(TASK, "MyTask", 1, 2), "limiter:conc:task:MyTask:1:2"),
    ],
)
def test_redis_key_is_the_contracts(lock: BaseLock, key: str) -> None:
    assert lock.redis_key == key


def test_unregistered_object_type_is_refused() -> None:
    with pytest.raises(ValueError, match="Unknown LockedObjectType 'planet'"):
        MutexLock("planet", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="planet"):
        LockedObjectType("planet")


async def test_mutex_has_one_owner_and_only_it_can_release(redis: Redis) -> None:
    ours, theirs = MutexLock(JOB, 1), MutexLock(JOB, 1)
    assert await ours.acquire(redis)
    assert not await theirs.acquire(redis)
    await theirs.release(redis)
    assert not await theirs.acquire(redis)
    assert 0 < await redis.pttl(ours.redis_key) <= 30_000
    await ours.release(redis)
    assert await theirs.acquire(redis)
    await theirs.release(redis)


async def test_mutex_extend_restores_the_ttl(redis: Redis) -> None:
    lock = MutexLock(JOB, 1, ttl_ms=60_000)
    assert await lock.acquire(redis)
    await redis.pexpire(lock.redis_key, 1_000)
    assert await lock.extend(redis)
    assert await redis.pttl(lock.redis_key) > 50_000
    assert not await MutexLock(JOB, 1).extend(redis)
    await lock.release(redis)
    assert not await lock.extend(redis)


async def test_a_writer_excludes_all_others_and_readers_exclude_writers(redis: Redis) -> None:
    writer, reader, other = ExclusiveRWLock(JOB, 1), SharedRWLock(JOB, 1), SharedRWLock(JOB, 1)
    assert await writer.acquire(redis)
    assert not await reader.acquire(redis)
    assert not await ExclusiveRWLock(JOB, 1).acquire(redis)
    assert await writer.extend(redis)
    await writer.release(redis)
    assert await reader.acquire(redis)
    assert await other.acquire(redis)
    assert await redis.ttl(reader.redis_key) == -1
    assert not await reader.extend(redis)
    await reader.release(redis)
    assert not await writer.acquire(redis)
    await other.release(redis)
    assert await writer.acquire(redis)
    await writer.release(redis)
    assert await redis.exists(writer.redis_key) == 0


async def test_P21_second_release_does_not_free_the_unit_of_another_owner(redis: Redis) -> None:
    first, second, writer = SharedRWLock(JOB, 1), SharedRWLock(JOB, 1), ExclusiveRWLock(JOB, 1)
    assert await first.acquire(redis)
    assert await second.acquire(redis)
    await first.release(redis)
    await first.release(redis)
    assert not await writer.acquire(redis), "the second reader still reads"
    await second.release(redis)
    assert await writer.acquire(redis)
    await writer.release(redis)


async def test_P20_no_sliding_window_exceeds_the_limit(redis: Redis) -> None:
    grants: list[tuple[float, float]] = []  # when it was asked for, and when we had it
    while len(grants) < 35:
        started = time.monotonic()
        if await Ten(JOB, 1).acquire(redis):
            grants.append((started, time.monotonic()))
        # Grants in bursts, so that a fixed window would let two bursts through side by side.
        await asyncio.sleep(0.004 if len(grants) % 7 else 0.02)
    for (started, _), (_, had) in zip(grants, grants[10:], strict=False):
        # The server granted the first after it was asked, and the eleventh before we had it.
        assert had - started > Ten.window_seconds - 0.001


async def test_P22_the_clock_of_a_client_has_no_effect(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [await Ten(JOB, 1).acquire(redis) for _ in range(10)] == [True] * 10
    monkeypatch.setattr(time, "time", lambda: 4_000_000_000.0)
    monkeypatch.setattr(time, "time_ns", lambda: 4_000_000_000 * 10**9)
    assert not await Ten(JOB, 1).acquire(redis)


async def test_rate_limiter_counts_units_and_gives_none_back(redis: Redis) -> None:
    big = Ten(JOB, 1, n_items=7)
    assert await big.acquire(redis)
    await big.release(redis)
    assert not await Ten(JOB, 1, n_items=4).acquire(redis)
    assert await Ten(JOB, 1, n_items=3).acquire(redis)
    assert not await big.extend(redis)
    assert await redis.pttl(big.redis_key) > 0


async def test_P26_more_items_than_the_limit_are_refused_with_both_numbers(redis: Redis) -> None:
    with pytest.raises(ValueError, match=r"n_items=11, more than its limit of 10"):
        await Ten(JOB, 1, n_items=11).acquire(redis)


async def test_disabled_limiters_grant_without_a_round_trip() -> None:
    nowhere = Redis(host="127.0.0.1", port=1)  # no server listens there
    for limiter in (RateLimiter(JOB, 1), ConcurrencyLimiter(JOB, 1)):
        assert await limiter.acquire(nowhere)
        await limiter.release(nowhere)
    await nowhere.aclose()


async def test_concurrency_limiter_frees_slots_on_release_and_expiry(redis: Redis) -> None:
    lasting, brief, third = Two(JOB, 1), Two(JOB, 1, ttl_ms=50), Two(JOB, 1)
    assert await lasting.acquire(redis)
    assert await brief.acquire(redis)
    assert not await third.acquire(redis)
    await until(lambda: third.acquire(redis), "the slot of a dead holder comes back", 5)
    await lasting.release(redis)
    assert await Two(JOB, 1).acquire(redis)


async def test_P24_concurrency_limiter_extend_returns_whether_the_slot_is_held(redis: Redis) -> None:
    held, gone = Two(JOB, 1, ttl_ms=5_000), Two(JOB, 1, ttl_ms=20)
    assert await held.acquire(redis)
    assert await gone.acquire(redis)
    assert await held.extend(redis)
    await asyncio.sleep(0.05)  # its time to live, by the server's clock
    assert not await gone.extend(redis)
    await held.release(redis)
    assert not await held.extend(redis)


async def test_locks_of_other_keys_do_not_interfere(redis: Redis) -> None:
    locks: list[BaseLock] = [
        MutexLock(JOB, 1),
        MutexLock(JOB, 2),
        MutexLock(TASK, 1),
        ExclusiveRWLock(JOB, 1),
    ]
    assert [await lock.acquire(redis) for lock in locks] == [True] * 4
    for lock in locks:
        await lock.release(redis)


async def test_mutual_exclusion_under_contention(redis: Redis) -> None:
    inside = most = 0

    async def contend() -> None:
        nonlocal inside, most
        lock = MutexLock(JOB, 1)
        while not await lock.acquire(redis):
            await asyncio.sleep(0)
        inside += 1
        most = max(most, inside)
        await asyncio.sleep(0)
        inside -= 1
        await lock.release(redis)

    await asyncio.gather(*(contend() for _ in range(25)))
    assert most == 1


class Many(RateLimiter):
    limit = 1_500
    window_seconds = 60.0


async def test_a_long_log_of_grants_stays_short_and_its_count_exact(redis: Redis) -> None:
    held = MutexLock(JOB, "held")
    assert await held.acquire(redis)
    key = Many(JOB, "many").redis_key
    for _ in range(Many.limit - 1):
        assert await Many(JOB, "many").acquire(redis)
    log = await redis.zrange(key, 0, -1, withscores=True)
    thousandths = (log[-1][1] - log[0][1]) / (Many.window_seconds * 1000)
    assert len(log) <= 1000 + thousandths + 2
    refused = [Many(JOB, "many").spec(), MutexLock(JOB, "held").spec()]
    for _ in range(3):
        assert await locking.acquire(redis, refused) is None
    assert await redis.zrange(key, 0, -1, withscores=True) == log, "what was merged is parted again"
    assert await Many(JOB, "many").acquire(redis)
    assert not await Many(JOB, "many").acquire(redis)
    await held.release(redis)


async def test_an_expired_holder_does_not_count_before_it_is_removed(redis: Redis) -> None:
    quota, slots = Many(JOB, "x"), Two(JOB, "x")
    await redis.zadd(quota.redis_key, {f"{number:016}:1:old": number for number in range(1, 9999)})
    await redis.zadd(slots.redis_key, {f"old-{number}": number for number in range(1, 9999)})
    late = Two(JOB, "x")
    await redis.zadd(slots.redis_key, {late.spec()["owner"]: 9999})
    for _ in range(2):
        assert await Two(JOB, "x").acquire(redis)
    assert not await Two(JOB, "x").acquire(redis)
    assert not await late.acquire(redis), "its slot has expired, too"
    assert await redis.zcard(slots.redis_key) > 2
    for _ in range(2):
        assert await Many(JOB, "x").acquire(redis)
    assert await redis.zcard(quota.redis_key) > 2
    [[spent, *_]] = await locking.inspect(
        redis, [{"key": quota.redis_key, "kind": "rate", "window_us": 60_000_000}], 1
    )
    assert spent == 2
