"""An occurrence is not submitted while the previous one is pending."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from diracx.tasks.plumbing import BaseLock, MutexLock, RateLimiter
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys, scheduling
from diracx.tasks.plumbing.broker.models import Delivery, Settlement, TaskMessage
from diracx.tasks.plumbing.broker.replies import ACCEPTED
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.worker.settlement import defer, defer_to_newer_worker, requeue
from redis.asyncio import Redis
from support.start_requests import start_request

pytestmark = pytest.mark.leaves_keys("diracx:*", "lock:*")

QUEUE = "diracx:tasks:normal:medium"
SCHEDULE = "test:Task@every night, twice/vo"


class Rate(RateLimiter):
    limit = 1
    window_seconds = 600


class Occurrences:
    """A schedule that is always due, and the only worker for its tasks."""

    def __init__(self, redis: Redis, broker: RedisStreamBroker) -> None:
        self.redis, self.broker, self.number = redis, broker, 0

    async def submit(self) -> bool:
        """Submit the next one, unless the one before still waits."""
        self.number += 1
        name = f"occurrence-{self.number}"
        data = TaskMessage(task_id=name, task_name="test:Task").dumpb()
        await self.redis.zadd(keys.NEXT_RUNS, {SCHEDULE: self.number})
        occurrence = {
            "id": SCHEDULE,
            "due": self.number,
            "next": 2**40,
            "stream": QUEUE,
            "task": name,
            "data": data,
        }
        [reply] = await scheduling.occur(self.redis, "leader", [occurrence]) or [0]
        assert reply in (1, 2)
        waiting = await scheduling.run_now(self.redis, SCHEDULE, QUEUE, name, data) if reply == 2 else None
        assert (reply == 2) == (waiting is not None), "a manual run gets the same reply"
        return reply == 1

    async def fetch(self) -> Delivery:
        [delivery] = (await self.broker.fetch(2, lease_seconds=60))[0]
        return delivery

    async def start(self, delivery: Delivery, *locks: BaseLock) -> bool:
        [reply] = await self.broker.start([start_request(delivery, locks, 60_000)])
        return reply.granted

    async def settle(self, settlement: Settlement) -> None:
        assert await self.broker.settle([settlement]) == [ACCEPTED]

    async def time_passes(self) -> None:
        """Make all deferred tasks due."""
        for task in await self.redis.zrange(keys.DELAYED, 0, -1):
            await self.redis.zadd(keys.DELAYED, {task: 1})
        await self.broker.promote()


@pytest.fixture
async def occurrences(redis: Redis, redis_url: str) -> AsyncIterator[Occurrences]:
    broker = RedisStreamBroker(redis_url, consumer_name="w")
    await redis.set(keys.LEADER, "leader", px=600_000)
    yield Occurrences(redis, broker)
    await broker.shutdown()


async def granted_its_lock(o: Occurrences, delivery: Delivery) -> None:
    holder = MutexLock(JOB, "a key with blanks")
    assert await holder.acquire(o.redis)
    assert not await o.start(delivery, MutexLock(JOB, "a key with blanks"))
    assert not await o.submit(), "while it is parked"
    await holder.release(o.redis)
    await o.time_passes()  # should its turn come by a timer


async def back_with_its_quota(o: Occurrences, delivery: Delivery) -> None:
    assert await Rate(JOB, 1).acquire(o.redis)
    assert not await o.start(delivery, Rate(JOB, 1))
    assert not await o.submit(), "while it waits for quota"
    await o.redis.delete(Rate(JOB, 1).redis_key)
    await o.time_passes()


async def retried(o: Occurrences, delivery: Delivery) -> None:
    assert delivery.data is not None
    message = TaskMessage.loadb(delivery.data)
    message.labels["attempt"] = str(message.labels.get("attempt", "")) + "x"
    again = defer(delivery, message.task_id, 60_000, message.dumpb())
    await o.settle(Settlement(delivery, retry=again))
    assert not await o.submit(), "while it waits for its retry"
    await o.time_passes()


async def left_to_newer(o: Occurrences, delivery: Delivery) -> None:
    await o.settle(defer_to_newer_worker(delivery, ValueError("a newer version")))
    assert not await o.submit()
    await o.time_passes()


async def requeued(o: Occurrences, delivery: Delivery) -> None:
    await o.settle(requeue(delivery))


MOVES: dict[str, Callable[[Occurrences, Delivery], Awaitable[None]]] = {
    each.__name__: each for each in (granted_its_lock, back_with_its_quota, retried, left_to_newer, requeued)
}


@pytest.mark.parametrize("second", MOVES)
@pytest.mark.parametrize("first", MOVES)
async def test_an_occurrence_that_was_moved_twice_still_prevents_the_next_one(
    occurrences: Occurrences, first: str, second: str
) -> None:
    assert await occurrences.submit()
    for move in (first, second):
        assert not await occurrences.submit(), "while it is queued"
        delivery = await occurrences.fetch()
        await MOVES[move](occurrences, delivery)
    for _ in range(3):
        assert not await occurrences.submit(), f"{first}, {second}: it is queued under another entry"
    last = await occurrences.fetch()
    assert await occurrences.submit(), "one that runs does not wait"
    await occurrences.settle(Settlement(last))
    assert not await occurrences.submit()


async def test_an_earlier_occurrence_that_is_retried_hides_no_later_one(occurrences: Occurrences) -> None:
    assert await occurrences.submit()
    first = await occurrences.fetch()
    assert await occurrences.submit()
    second = await occurrences.fetch()
    await retried_beside(occurrences, first)
    assert await occurrences.submit(), "the second one runs"
    await occurrences.settle(Settlement(second))
    assert not await occurrences.submit(), "the third one waits"


async def retried_beside(o: Occurrences, delivery: Delivery) -> None:
    again: dict[str, Any] = defer(delivery, "occurrence-1", 0, delivery.data or b"")
    await o.settle(Settlement(delivery, retry=again))
    await o.time_passes()


async def forget(o: Occurrences) -> None:
    """Its class was deleted, or the configuration names it no longer."""
    assert await scheduling.plan(o.redis, "leader", [{"id": SCHEDULE, "forgotten": 1}])


@pytest.mark.parametrize("move", MOVES)
async def test_a_schedule_that_was_removed_and_returns_finds_its_pending_occurrence(
    occurrences: Occurrences, move: str
) -> None:
    assert await occurrences.submit()
    await forget(occurrences)
    assert not await occurrences.submit(), "it is queued"
    delivery = await occurrences.fetch()
    await forget(occurrences)  # while it runs
    await MOVES[move](occurrences, delivery)
    await forget(occurrences)
    assert not await occurrences.submit(), f"{move}: it is queued under another entry"


async def test_a_removed_schedule_leaves_no_keys_after_its_last_occurrence(
    occurrences: Occurrences,
) -> None:
    assert await occurrences.submit()
    delivery = await occurrences.fetch()
    await forget(occurrences)
    await occurrences.settle(Settlement(delivery))
    await forget(occurrences)  # with the next plan
    assert SCHEDULE.encode() not in await scheduling.stored_schedules(occurrences.redis)
