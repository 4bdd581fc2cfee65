"""Combinations of locks of one task: duplicates, thousands, unavailable ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from diracx.tasks.plumbing import (
    BaseLock,
    BaseTask,
    ConcurrencyLimiter,
    ExclusiveRWLock,
    MutexLock,
    RateLimiter,
    SharedRWLock,
    schedule_many,
)
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys, locking
from diracx.tasks.plumbing.broker.models import Settlement, Submission, TaskMessage
from diracx.tasks.plumbing.broker.replies import ACCEPTED
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import MAX_LOCKS
from diracx.tasks.plumbing.standalone import holding
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from redis.exceptions import ResponseError
from support.start_requests import start_request


class Rate(RateLimiter):
    limit = 4
    window_seconds = 0.2


class OtherRate(Rate):
    limit = 5


class Slots(ConcurrencyLimiter):
    limit = 3


class OneSlot(ConcurrencyLimiter):
    limit = 1


class AnyNumber(ConcurrencyLimiter):
    limit = 2**53


class HalfSlot(ConcurrencyLimiter):
    limit = 2.5  # type: ignore[assignment]


class HalfRate(Rate):
    limit = 4.5  # type: ignore[assignment]


class AsMutex(SharedRWLock):
    """A custom lock with the prefix of another kind."""

    _prefix = "lock:mutex"


ONCE = {
    "mutex twice": lambda: [MutexLock(JOB, 1), MutexLock(JOB, 1)],
    "one object twice": lambda: [MutexLock(JOB, 1)] * 2,
    "key as number and text": lambda: [MutexLock(JOB, 1), MutexLock(JOB, "1")],
    "read and write": lambda: [SharedRWLock(JOB, 1), ExclusiveRWLock(JOB, 1)],
    "write and read": lambda: [ExclusiveRWLock(JOB, 1), SharedRWLock(JOB, 1)],
    "write twice": lambda: [ExclusiveRWLock(JOB, 1, ttl_ms=500), ExclusiveRWLock(JOB, 1)],
    "read twice": lambda: [SharedRWLock(JOB, 1), SharedRWLock(JOB, 1)],
    "two slots of three and of one": lambda: [Slots(JOB, 1), OneSlot(JOB, 1)],
    "two rate limiters": lambda: [Rate(JOB, 1), Rate(JOB, 1, n_items=2)],
    "mutexes, and limiters that are off": lambda: [MutexLock(JOB, 1), RateLimiter(JOB, 1), MutexLock(JOB, 1)],
    "all there are": lambda: [MutexLock(JOB, n) for n in range(MAX_LOCKS)],
    "one key thousands of times": lambda: [MutexLock(JOB, 1) for _ in range(5 * MAX_LOCKS)],
    "more slots than anybody has": lambda: [AnyNumber(JOB, 1)],
    "whole units, given as a float": lambda: [Rate(JOB, 1, n_items=1.0)],  # type: ignore[arg-type]
    "all kinds on one object, twice": lambda: [
        kind(JOB, 1) for kind in (MutexLock, SharedRWLock, ExclusiveRWLock, Slots, Rate) for _ in range(2)
    ],
}

NEVER = {
    "two rates": (lambda: [Rate(JOB, 1), OtherRate(JOB, 1)], "limiter:rate:job:1 is declared with two rates"),
    "more units than the limit": (lambda: [Rate(JOB, 1, n_items=3)] * 2, "limiter:rate:job:1 .* n_items=6 .* 4"),
    "two kinds": (
        lambda: [MutexLock(JOB, 1), AsMutex(JOB, 1)],
        "job:1 is declared as mutex and as shared",
    ),
    "too many": (lambda: [SharedRWLock(JOB, n) for n in range(MAX_LOCKS + 1)], f"more than {MAX_LOCKS} locks"),
    "too long": (lambda: [MutexLock(JOB, 1, ttl_ms=2**63)], "lock:mutex:job:1: ttl_ms must be"),
    "parts of units": (
        lambda: [Rate(JOB, 1, n_items=0.4)],  # type: ignore[arg-type]
        "limiter:rate:job:1: n_items must be",
    ),
    "no number of units": (
        lambda: [Rate(JOB, 1, n_items=float("nan"))],  # type: ignore[arg-type]
        "limiter:rate:job:1: n_items must be",
    ),
    "parts of a rate": (lambda: [HalfRate(JOB, 1)], "limiter:rate:job:1: limit must be"),
    "parts of slots": (lambda: [HalfSlot(JOB, 1)], "limiter:conc:job:1: limit must be"),
    "parts of ms": (lambda: [Slots(JOB, 1, ttl_ms=0.5)], "limiter:conc:job:1: ttl_ms must be"),  # type: ignore[arg-type]
}

DECLARED: dict[str, Callable[[], list[BaseLock]]] = {**ONCE, **{name: make for name, (make, _) in NEVER.items()}}
RAN: list[str] = []


@dataclass
class Declares(BaseTask):
    which: str
    number: int = 0

    @property
    def execution_locks(self) -> list[BaseLock]:
        return DECLARED[self.which]()

    async def execute(self) -> None:
        RAN.append(self.which)


@dataclass
class ReadsMany(BaseTask):
    first: int

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [SharedRWLock(JOB, self.first + n) for n in range(100)]

    async def execute(self) -> None:
        RAN.append("reads many")


async def locks_left(redis: Redis) -> list[bytes]:
    left: list[bytes] = [key async for key in redis.scan_iter("lock:*", count=10_000)]
    return left + [key async for key in redis.scan_iter("limiter:conc:*", count=10_000)]


@pytest.mark.parametrize("which", ONCE)
async def test_a_task_that_declares_a_key_more_than_once_runs(redis_url: str, redis: Redis, which: str) -> None:
    RAN.clear()
    async with TaskSystem([Declares], redis_url=redis_url, scheduler=False) as system:
        await schedule_many([Declares(which, number) for number in range(3)])
        await system.drain()
    assert [which] * 3 == RAN
    assert await locks_left(redis) == []
    assert await redis.keys(keys.HELD_PREFIX + "*") == []


@pytest.mark.parametrize("which", NEVER)
async def test_locks_that_can_never_be_granted_together_are_refused_by_name(
    redis_url: str, redis: Redis, which: str
) -> None:
    """Times of its submission, and of its start, for those submitted by an earlier version of the class."""
    make, reason = NEVER[which]
    DECLARED[which] = lambda: []
    try:
        async with TaskSystem([Declares], redis_url=redis_url, workers=0, scheduler=False):
            await Declares(which).schedule()
        DECLARED[which] = make
        async with TaskSystem([Declares], redis_url=redis_url, scheduler=False) as system:
            with pytest.raises(ValueError, match=f"the locks of Declares .*{reason}"):
                await Declares(which).schedule()
            await system.drain()
            assert system.task_db is not None
            async with system.task_db as db:
                [dead_letter] = await db.search()
            assert (dead_letter["reason"], dead_letter["task_name"]) == ("arguments", "test:Declares")
    finally:
        DECLARED[which] = make
    with pytest.raises(ValueError, match=reason):
        async with holding(make(), redis):
            pass
    assert await locks_left(redis) == []


async def test_a_batch_of_tasks_may_have_thousands_of_locks(redis_url: str, redis: Redis) -> None:
    RAN.clear()
    async with TaskSystem([ReadsMany], redis_url=redis_url, workers=2, concurrency=50, scheduler=False) as system:
        await schedule_many([ReadsMany(100 * n) for n in range(100)])
        await system.drain()
    assert len(RAN) == 100
    assert await locks_left(redis) == []


async def test_locks_that_cannot_all_be_taken_leave_none_taken(redis: Redis) -> None:
    """Locks of readers have no TTL, so that those of a failed step would stay forever."""
    await redis.set("lock:rw:job:7", "no hash", ex=60)
    locks: list[BaseLock] = [SharedRWLock(JOB, n) for n in range(10)]
    for wanted in (locks, [Rate(JOB, 1), *locks]):
        with pytest.raises(ResponseError, match="WRONGTYPE"):
            await locking.acquire(redis, [lock.spec() for lock in wanted])
        assert await locks_left(redis) == [b"lock:rw:job:7"]
        assert not await redis.exists(Rate(JOB, 1).redis_key)


@pytest.mark.parametrize("units", [0.4, 1.5, float("inf")])
async def test_parts_of_units_are_refused_for_the_server_would_round_them(redis: Redis, units: float) -> None:
    limiter = Rate(JOB, 1, n_items=units)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_items must be a whole number"):
        await limiter.acquire(redis)
    assert not await redis.exists(limiter.redis_key)


async def test_slots_of_dead_workers_are_released_for_any_limit(redis_url: str, redis: Redis) -> None:
    """Their limit stands in the held-locks record, and must be read again from it."""
    crashes, reclaims = (RedisStreamBroker(redis_url, consumer_name=name) for name in ("crashes", "reclaims"))
    stream = "diracx:tasks:normal:medium"
    await crashes.submit([Submission(TaskMessage(task_id="task", task_name="test:Task"), stream)])
    [delivery], _ = await crashes.fetch(1, lease_seconds=60)
    requested = start_request(delivery, [AnyNumber(JOB, 1, ttl_ms=600_000)])
    assert [reply.granted for reply in await crashes.start([requested])] == [True]
    await redis.zadd(keys.ALIVE, {"crashes": 1, "reclaims": 2**50})
    [again], *_ = await reclaims.reclaim(1, lease_seconds=60)
    assert await locks_left(redis) == []
    assert await reclaims.settle([Settlement(again)]) == [ACCEPTED]
    for broker in (crashes, reclaims):
        await broker.leave()
        await broker.shutdown()


async def test_a_worker_that_dies_while_it_acquires_locks_leaves_no_lock(redis_url: str, redis: Redis) -> None:
    """Locks are recorded before they are taken: the worker that reclaims the delivery releases them."""
    brokers = {name: RedisStreamBroker(redis_url, consumer_name=name) for name in ("crashes", "reclaims")}
    stream = "diracx:tasks:normal:medium"
    messages = [TaskMessage(task_id=f"task {n}", task_name="test:Task") for n in range(2)]
    await brokers["crashes"].submit([Submission(message, stream) for message in messages])
    await redis.set("lock:rw:job:1", "no hash", ex=60)
    first, second = (await brokers["crashes"].fetch(2, lease_seconds=60))[0]
    wanted = [
        start_request(delivery, [SharedRWLock(JOB, number)]) for number, delivery in enumerate((first, second))
    ]
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await brokers["crashes"].start(wanted)
    assert await redis.exists("lock:rw:job:0")
    await redis.zadd(keys.ALIVE, {"crashes": 1, "reclaims": 2**50})
    deliveries, *_ = await brokers["reclaims"].reclaim(2, lease_seconds=60)
    assert await locks_left(redis) == [b"lock:rw:job:1"]
    settled = await brokers["reclaims"].settle([Settlement(delivery) for delivery in deliveries])
    assert settled == [ACCEPTED, ACCEPTED]
    for broker in brokers.values():
        await broker.leave()
        await broker.shutdown()
