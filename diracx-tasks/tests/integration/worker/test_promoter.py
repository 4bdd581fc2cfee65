"""Promotion of delayed tasks, with and without a scheduler."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from diracx.tasks.plumbing import BaseTask
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys, locking
from diracx.tasks.plumbing.broker.models import Submission, TaskMessage
from diracx.tasks.plumbing.worker.promoter import Promoter
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis

pytestmark = pytest.mark.event_loops("asyncio", "uvloop")

#: So long that nothing would begin in any test, were it for the looks now and then.
SELDOM = {"housekeeping_seconds": 3600}


class Now(BaseTask):
    async def execute(self) -> datetime:
        return datetime.now(UTC)


async def far_away(broker: RedisStreamBroker) -> None:
    """A task is delayed already, for so long that no check is needed."""
    due = datetime.now(UTC) + timedelta(hours=1)
    message = TaskMessage(task_id="far-away", task_name="test:Now")
    await broker.submit([Submission(message, keys.stream_name_for("normal", "medium"), due)])


async def forget(redis: Redis) -> None:
    await redis.delete(keys.DELAYED, keys.DELAYED_DATA, keys.DELAYED_REASONS)


async def test_without_any_scheduler_a_delayed_task_begins_when_it_is_due(redis_url: str) -> None:
    async with TaskSystem([Now], redis_url=redis_url, scheduler=False, settings=SELDOM) as system:
        await far_away(system.broker)
        due = datetime.now(UTC) + timedelta(seconds=0.2)
        begun = await system.result(await Now().schedule(at_time=due), timeout=60)
        assert begun.return_value >= due
        await forget(system.broker.redis)


async def test_a_worker_promotes_delayed_tasks_without_a_scheduler(redis_url: str) -> None:
    async with TaskSystem([Now], redis_url=redis_url, workers=0, scheduler=False) as system:
        due = datetime.now(UTC) + timedelta(seconds=0.5)
        task = await Now().schedule(at_time=due)
        async with TaskSystem([Now], redis_url=redis_url, workers=1, scheduler=False, settings=SELDOM):
            begun = await system.result(task, timeout=60)
            assert begun.return_value >= due


async def test_workers_are_notified_of_due_tasks_only_without_a_scheduler(redis: Redis, redis_url: str) -> None:
    broker = RedisStreamBroker(redis_url)
    leader, workers = redis.pubsub(), redis.pubsub(ignore_subscribe_messages=True)
    try:
        await workers.subscribe(keys.WAKE_WORKERS)
        await workers.get_message(timeout=5)  # the reply to that
        await leader.subscribe(keys.WAKE_SCHEDULER)
        await leader.get_message(timeout=5)
        await far_away(broker)
        received = await leader.get_message(timeout=5)
        assert received is not None
        assert received["data"] == b"delayed"
        assert await workers.get_message(timeout=0) is None
        await leader.unsubscribe()
        await leader.get_message(timeout=5)
        await forget(redis)
        await far_away(broker)
        received = await workers.get_message(timeout=5)
        assert received is not None
        assert 3_500_000 < int(received["data"]) <= 3_600_002
        await forget(redis)
    finally:
        await leader.aclose()
        await workers.aclose()
        await broker.shutdown()


async def test_only_the_leading_scheduler_waits_for_due_tasks(redis: Redis, redis_url: str) -> None:
    broker = RedisStreamBroker(redis_url)
    try:
        await far_away(broker)
        assert 3_500_000 < (await broker.promote() or 0) <= 3_600_002
        assert await locking.acquire(
            redis, [{"kind": "mutex", "key": keys.LEADER, "owner": "x", "ttl_ms": 60_000}]
        )
        assert 3_500_000 < (await broker.promote() or 0) <= 3_600_002, "its lead will have ended by then"
        due = datetime.now(UTC) + timedelta(seconds=30)
        message = TaskMessage(task_id="soon", task_name="test:Now")
        await broker.submit([Submission(message, keys.stream_name_for("normal", "medium"), due)])
        assert 30_000 < (await broker.promote() or 0) <= 60_001, "when its lead ends, it may be dead"
        await forget(redis)
        assert await broker.promote() is None, "while there is nothing, a look now and then will do"
    finally:
        await redis.delete(keys.LEADER)
        await forget(redis)
        await broker.shutdown()


async def test_due_tasks_of_a_dead_scheduler_start_when_its_lease_expires(redis: Redis, redis_url: str) -> None:
    dead = redis.pubsub()
    try:
        await dead.subscribe(keys.WAKE_SCHEDULER)  # it hears, and does nothing
        await dead.get_message(timeout=5)
        assert await locking.acquire(redis, [{"kind": "mutex", "key": keys.LEADER, "owner": "x", "ttl_ms": 3_000}])
        async with TaskSystem([Now], redis_url=redis_url, workers=0, scheduler=False) as system:
            due = datetime.now(UTC) + timedelta(seconds=1.5)
            task = await Now().schedule(at_time=due)
            async with TaskSystem([Now], redis_url=redis_url, workers=1, scheduler=False, settings=SELDOM):
                assert (await system.result(task, timeout=30)).return_value >= due
    finally:
        await dead.aclose()


async def test_a_promoter_wakes_for_earlier_tasks_and_not_for_later_ones() -> None:
    looks = 0
    looked = asyncio.Event()

    class Broker:
        async def promote(self) -> int | None:
            nonlocal looks
            looks += 1
            looked.set()
            return 3_600_000

    promoter = Promoter(Broker(), 7200)  # type: ignore[arg-type]  # all that it uses
    running = asyncio.create_task(promoter.run())
    await looked.wait()
    looked.clear()
    promoter.due_in(b"3700000")
    promoter.due_in(b"20")
    async with asyncio.timeout(60):
        await looked.wait()
    assert looks == 2
    running.cancel()
