"""How a worker comes by its messages: at once when it is idle, and never before it can start them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.broker.models import Delivery, Settlement, Submission, TaskMessage
from diracx.tasks.plumbing.worker.intake import Intake
from diracx.tasks.plumbing.worker.settings import WorkerSettings
from redis.asyncio import Redis

# What is in hand, or still queued, when the test ends.
pytestmark = pytest.mark.leaves_keys("diracx:tasks:*")

NORMAL, REALTIME = "diracx:tasks:normal:medium", "diracx:tasks:realtime:medium"


@pytest.fixture
async def broker(redis_url: str) -> AsyncIterator[RedisStreamBroker]:
    broker = RedisStreamBroker(redis_url)
    yield broker
    await broker.shutdown()


def intake_of(broker: RedisStreamBroker, stop: asyncio.Event | None = None, *, idle: bool = True) -> Intake:
    return Intake(broker, WorkerSettings(), stop or asyncio.Event(), list, lambda: idle)


def submission(task_id: str, stream: str = NORMAL) -> Submission:
    return Submission(TaskMessage(task_id=task_id, task_name="test:Task"), stream)


async def waits(redis: Redis) -> None:
    """Until a worker waits for news."""
    while not any(client["cmd"] == "xread" for client in await redis.client_list()):
        await asyncio.sleep(0.002)


async def in_hand(redis: Redis) -> int:
    if not await redis.exists(NORMAL):
        return 0
    return sum(group["pending"] for group in await redis.xinfo_groups(NORMAL))


async def evaluations(redis: Redis) -> int:
    stats = await redis.info("commandstats")
    return int(stats.get("cmdstat_evalsha", {"calls": 0})["calls"])


async def test_an_idle_worker_is_given_what_comes_without_asking_again(
    broker: RedisStreamBroker, redis: Redis
) -> None:
    intake = intake_of(broker)
    asked = asyncio.create_task(intake.next(10))
    await waits(redis)
    before = await evaluations(redis)
    await broker.submit([submission("one")])
    [delivery] = await asked
    assert await broker.settle([Settlement(delivery)]) == [True]
    asked = asyncio.create_task(intake.next(10))
    await waits(redis)
    await broker.submit([submission("two")])
    assert len(await asked) == 1
    # For each message one step that hands it out; and one that settles the first, in between.
    assert await evaluations(redis) - before == 3


async def test_an_idle_worker_is_given_the_most_urgent_of_what_comes_together(
    broker: RedisStreamBroker, redis: Redis
) -> None:
    asked = asyncio.create_task(intake_of(broker).next(1))
    await waits(redis)
    async with redis.pipeline(transaction=True) as pipe:
        for each in (submission("later"), submission("now", REALTIME)):
            pipe.xadd(each.stream, {"data": each.message.dumpb()})
        await pipe.execute()
    [delivery] = await asked
    assert delivery.stream == REALTIME


async def test_a_worker_that_runs_something_is_given_nothing_before_it_asks(
    broker: RedisStreamBroker, redis: Redis
) -> None:
    """What runs may block its event loop; others can start the message meanwhile."""
    intake = intake_of(broker, idle=False)
    asked = asyncio.create_task(intake.next(10))
    await waits(redis)
    await broker.submit([submission("one")])
    assert await asked == []
    assert await in_hand(redis) == 0
    assert len(await intake.next(10)) == 1


async def test_what_comes_while_an_idle_worker_stops_is_returned_or_was_never_taken(
    broker: RedisStreamBroker, redis: Redis
) -> None:
    for number in range(20):
        await redis.flushall()
        stop = asyncio.Event()
        asked = asyncio.create_task(intake_of(broker, stop).next(10))
        await waits(redis)
        submitting = asyncio.create_task(broker.submit([submission(str(number))]))
        for _ in range(number % 10):
            await asyncio.sleep(0)
        stop.set()
        deliveries = await asked
        await submitting
        assert await in_hand(redis) == len(deliveries)


async def test_a_server_that_forgets_its_scripts_while_a_worker_waits_delivers_all_the_same(
    broker: RedisStreamBroker, redis: Redis
) -> None:
    asked = asyncio.create_task(intake_of(broker).next(10))
    await waits(redis)
    await redis.script_flush()
    await broker.submit([submission("one")])
    assert len(await asked) == 1


class SaysOnce(RedisStreamBroker):
    """Knows of no moment at which to look again for what the dead have left."""

    async def reclaim(self, free: int, **options: Any) -> tuple[list[Delivery], float]:
        deliveries, _ = await super().reclaim(free, **options)
        return deliveries, 3600.0


async def test_P9_when_a_suspect_is_settled_the_next_one_comes_at_once(redis_url: str, redis: Redis) -> None:
    first, second, broker = (SaysOnce(redis_url, consumer_name=name) for name in ("first", "second", "third"))
    await broker.submit([submission(text) for text in "abc"])
    assert len((await first.fetch(3))[0]) == 3
    await redis.zadd(keys.ALIVE, {"first": 1})
    assert len((await second.reclaim(3))[0]) == 3
    await redis.zadd(keys.ALIVE, {"second": 1})
    held: list[Delivery] = []

    def places() -> list[tuple[str, str]]:
        return [(each.stream, each.entry) for each in held]

    intake = Intake(broker, WorkerSettings(), asyncio.Event(), places, lambda: True)
    for _ in "abc":
        held += await intake.next(10)
        assert len(held) == 1, "one at a time, and each without delay"
        asked = asyncio.create_task(intake.next(10))
        await waits(redis)
        assert await broker.settle([Settlement(held[0])]) == [True]
        intake.settled([held.pop()])
        assert await asked == []
    for each in (first, second, broker):
        await each.shutdown()
