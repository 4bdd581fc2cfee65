"""Groups of any size are submitted atomically, and exist as long as their children."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
from diracx.tasks.plumbing import (
    BaseTask,
    ChildResults,
    fire_callback,
    spawn_with_callback,
)
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys, scripts
from diracx.tasks.plumbing.broker.groups import GroupState, read_group
from diracx.tasks.plumbing.broker.models import Settlement, TaskMessage
from diracx.tasks.plumbing.broker.replies import ACCEPTED
from diracx.tasks.plumbing.broker.submitting import GROUP_BATCH
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from support.grouped_tasks import GROUP_TASKS, Callback, Child, brokers, ended
from support.standard_tasks import SEEN

# --- large groups ----------------------------------------------------------------------------------------

LARGE = 10_000


async def test_a_group_of_10_000_blocks_the_server_only_briefly(redis_url: str, redis: Redis) -> None:
    count = 0

    @dataclass
    class Quick(BaseTask):
        number: int

        async def execute(self) -> int:
            nonlocal count
            count += 1
            return self.number

    class Adds(BaseTask):
        async def execute(self, results: ChildResults) -> None:
            SEEN.append((count, sum(result.return_value for result in results.values())))

    async with TaskSystem([Quick, Adds], redis_url=redis_url, workers=0):
        before = (await redis.info("commandstats")).get("cmdstat_evalsha", {"calls": 0})["calls"]
        await spawn_with_callback([Quick(number) for number in range(LARGE)], Adds())
        steps = (await redis.info("commandstats"))["cmdstat_evalsha"]["calls"] - before
        # Into the group, and from there into the queue: a few ms each, with everybody else's in between.
        assert steps >= 2 * LARGE / GROUP_BATCH - 2
        assert await redis.xlen("diracx:tasks:normal:medium") == LARGE
    settings = {"result_ttl_seconds": None}
    async with TaskSystem([Quick, Adds], redis_url=redis_url, concurrency=200, settings=settings) as system:
        await system.drain(timeout=60)
    assert [(LARGE, sum(range(LARGE)))] == SEEN
    assert await redis.keys("diracx:groups*") == []


def staged(broker: RedisStreamBroker, number: int) -> dict[str, Any]:
    message = TaskMessage(task_id=f"child-{number}", task_name="test:Child", task_args=[number])
    message.labels["group_id"] = "the-group"
    return {"task": message.task_id, "staged": b"diracx:tasks:normal:medium\n" + message.dumpb()}


FIELDS = {
    "total": 4,
    "ttl_ms": 60_000,
    "callback_name": "test:Callback",
    "callback_stream": "diracx:tasks:normal:medium",
    "callback": TaskMessage(task_id="the-callback", task_name="test:Callback").dumpb(),
}


async def test_a_crash_during_the_submission_of_a_group_starts_no_child_and_leaves_no_keys(
    redis_url: str, redis: Redis
) -> None:
    async with TaskSystem(GROUP_TASKS, redis_url=redis_url) as system:
        await scripts.group(redis, "the-group", FIELDS, [staged(system.broker, n) for n in range(2)], last=False)
        # The submitter has crashed. Neither its children nor its callback may start.
        status = await read_group(redis, "the-group")
        assert status is not None
        assert (status.state, status.pending) == (GroupState.SUBMITTING, 4)
        assert not await fire_callback(redis, "the-group")
        await system.result(await Child(100).schedule())
        await system.drain()
        assert SEEN == [100]
        for key in await redis.keys("diracx:groups*"):
            assert 0 < await redis.ttl(key) <= 600, key
        assert not await redis.exists(keys.GROUP_OUTBOX)
        # And if it lives but was too slow, it learns that its group is no more.
        await redis.delete("diracx:groups:the-group")
        reply = await scripts.group(redis, "the-group", None, [staged(system.broker, 3)], last=True)
        assert reply == -1


async def test_other_processes_complete_a_group_after_a_crash_behind_its_last_child(
    redis_url: str, redis: Redis
) -> None:
    async with TaskSystem(GROUP_TASKS, redis_url=redis_url, workers=0) as submitting:
        broker = submitting.broker
        await scripts.group(redis, "the-group", FIELDS, [staged(broker, n) for n in range(3)], last=False)
        assert await scripts.group(redis, "the-group", None, [staged(broker, 3)], last=True) == 2
        assert await redis.xlen("diracx:tasks:normal:medium") == 0
    async with TaskSystem(GROUP_TASKS, redis_url=redis_url) as system:
        await system.drain()
    assert SEEN == [0, 1, 2, 3, "callback"]


async def test_a_large_group_starts_when_all_of_it_has_arrived(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(GROUP_TASKS, redis_url=redis_url) as system:
        await spawn_with_callback([Child(number) for number in range(2 * GROUP_BATCH + 1)], Callback())
        await system.drain()
    assert sorted(SEEN[:-1]) == list(range(2 * GROUP_BATCH + 1))
    assert SEEN[-1] == "callback"


async def test_a_group_outlives_its_ttl_while_its_children_run(redis_url: str, redis: Redis) -> None:
    gate = asyncio.Event()

    class Waits(BaseTask):
        async def execute(self) -> None:
            await gate.wait()

    async with TaskSystem([Waits, Callback], redis_url=redis_url) as system:
        await spawn_with_callback([Waits()], Callback(), ttl_seconds=1)
        await asyncio.sleep(1.5)  # longer than its time to live
        gate.set()
        await system.drain()
    assert SEEN == ["callback"]


async def test_the_end_or_retry_of_a_child_renews_the_life_of_its_group(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(GROUP_TASKS, redis_url=redis_url, workers=0), brokers(redis_url) as (one, _):
        group = await spawn_with_callback([Child(1), Child(2)], Callback())
        deliveries, _ = await one.fetch(2)
        for settlement in (ended(deliveries[0]), Settlement(deliveries[1], group={"id": group})):
            for key in await redis.keys("diracx:groups*"):
                await redis.expire(key, 100)
            assert await one.settle([settlement]) == [ACCEPTED]
            for key in await redis.keys("diracx:groups*"):
                assert await redis.ttl(key) > 86_400


async def test_a_group_that_cannot_be_submitted_leaves_no_keys(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(GROUP_TASKS, redis_url=redis_url, workers=0):
        with pytest.raises(TypeError, match="object"):
            await spawn_with_callback([Child(1), Child(object())], Callback())  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="ttl_seconds must be positive, not 0"):
            await spawn_with_callback([Child(1)], Callback(), ttl_seconds=0)
    assert await redis.keys("diracx:groups*") == []
    assert await redis.keys("diracx:tasks:*:*") == []
