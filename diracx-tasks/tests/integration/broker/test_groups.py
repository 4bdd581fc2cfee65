"""Callback groups: the callback runs once, after the last child, despite failures."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest
from diracx.tasks.plumbing import (
    BaseTask,
    fire_callback,
    spawn_with_callback,
)
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.broker.groups import GroupState, list_groups, read_group
from diracx.tasks.plumbing.broker.models import Settlement, TaskMessage
from diracx.tasks.plumbing.broker.replies import ACCEPTED, TAKEN_OVER
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from support.crashing_tasks import LEASE_SECONDS, Marks
from support.crashing_tasks import TASKS as CRASHING_TASKS
from support.grouped_tasks import GROUP_TASKS, Callback, Child, Fails, Locked, Sum, brokers, ended
from support.paths import SUPPORT
from support.standard_tasks import SEEN
from support.waiting import until
from support.warm_commands import WarmCommands


async def test_P32_a_child_that_waits_for_a_lock_has_not_ended(redis_url: str) -> None:
    async with TaskSystem(GROUP_TASKS, redis_url=redis_url, workers=3) as system:
        await spawn_with_callback([Locked(number) for number in range(30)], Callback())
        await system.drain()
    assert sorted(SEEN[:-1]) == list(range(30))
    assert SEEN[-1] == "callback"


async def names(broker: RedisStreamBroker) -> list[str]:
    """Take all messages from the queue and return their names."""
    deliveries, _ = await broker.fetch(100)
    await broker.settle([Settlement(delivery) for delivery in deliveries])
    return [TaskMessage.loadb(delivery.data or b"").task_name for delivery in deliveries]


async def test_P33_a_redelivered_child_is_subtracted_once(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(GROUP_TASKS, redis_url=redis_url, workers=0), brokers(redis_url) as (one, two):
        group = await spawn_with_callback([Child(1), Child(2)], Callback())
        [first], _ = await one.fetch(1)
        # The worker is taken for dead: another one runs the child, and the first comes back.
        await redis.zadd(keys.ALIVE, {"one": 0})
        [again], *_ = await two.reclaim(1)
        assert again.deliveries == 2
        assert await one.settle([ended(first)]) == [TAKEN_OVER]
        status = await read_group(redis, group)
        assert status is not None
        assert (status.pending, status.succeeded) == (2, 0)
        assert await two.settle([ended(again)]) == [ACCEPTED]
        # A settlement that is repeated (its reply was lost), and a child that was executed twice after all.
        assert await two.settle([ended(again), ended(again)]) == [TAKEN_OVER, TAKEN_OVER]
        await two.redis.xadd(again.stream, {"data": again.data})
        [second, twin], _ = await two.fetch(2)
        assert await two.settle([ended(twin)]) == [ACCEPTED]
        status = await read_group(redis, group)
        assert status is not None
        assert (status.pending, status.succeeded) == (1, 1)
        assert await two.settle([ended(second)]) == [ACCEPTED]
        assert await names(two) == ["test:Callback"]
        assert await read_group(redis, group) is None
        assert not await fire_callback(redis, group)
        assert await names(two) == []


@pytest.mark.leaves_keys("diracx:tasks:*")  # the name of the dead worker, if no worker has checked again
async def test_P33_a_child_of_a_killed_worker_is_restarted_and_the_callback_runs_once(
    redis_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch, warm_commands: WarmCommands
) -> None:
    monkeypatch.setenv("TEST_REDIS_URL", redis_url)
    async with TaskSystem(CRASHING_TASKS, redis_url=redis_url, workers=0):
        await spawn_with_callback([Marks("a"), Marks("b", ends=True)], Marks("callback", ends=True))
    script = SUPPORT / "crashing_tasks.py"
    process = warm_commands.worker(script, redis_url, env={**os.environ, "TEST_HANGS": "1"})
    try:
        await until(
            lambda: redis.exists("started:a", "started:b"), "the children start", 30, when=lambda found: found == 2
        )
    finally:
        process.kill()
        process.wait()
    async with TaskSystem(
        CRASHING_TASKS, redis_url=redis_url, settings={"lease_seconds": LEASE_SECONDS}
    ) as system:
        await system.drain(timeout=20)
    assert await redis.llen("started:a") == 2
    assert await redis.llen("started:callback") == 1
    assert await redis.keys("diracx:groups*") == []


async def test_an_operator_fires_a_group_once_and_children_that_end_later_change_nothing(
    redis_url: str, redis: Redis
) -> None:
    async with TaskSystem(GROUP_TASKS, redis_url=redis_url, workers=0) as submitting:
        group = await spawn_with_callback([Child(1), Child(2)], Callback())
        assert await fire_callback(redis, group, submitting.broker)
        assert not await fire_callback(redis, group)
    async with TaskSystem(GROUP_TASKS, redis_url=redis_url) as system:
        await system.drain()
    assert sorted(map(str, SEEN)) == ["1", "2", "callback"]


# --- failures --------------------------------------------------------------------------------------------


async def test_P33_a_permanent_failure_of_a_child_marks_its_group_and_a_retried_one_does_not(
    redis_url: str, redis: Redis
) -> None:
    gate = asyncio.Event()

    class Waits(BaseTask):
        async def execute(self) -> None:
            await gate.wait()

    async with TaskSystem([*GROUP_TASKS, Waits], redis_url=redis_url, scheduler=True) as system:
        group = await spawn_with_callback([Child(1), Fails(), Waits()], Callback(), ttl_seconds=60)
        while (status := await read_group(redis, group)) is None or not status.failed:
            if SEEN.count("attempt") in (1, 2):
                assert status is not None
                assert status.state is GroupState.PENDING, "a retry is no failure"
            await asyncio.sleep(0.005)
        assert SEEN.count("attempt") == 3
        assert (status.state, status.total, status.pending) == (GroupState.FAILED, 3, 1)
        assert list(status.failed_children.values()) == ["ValueError: there is no such site"]
        assert (status.callback, status.on_failure) == ("test:Callback", None)
        for key in await redis.keys("diracx:groups*"):
            assert await redis.ttl(key) > 86_400, f"{key!r} lives while a child may still end, and not for ever"
        gate.set()
        await system.drain()
        [status] = await list_groups(redis)
        assert (status.group_id, status.state, status.pending) == (group, GroupState.FAILED, 0)
        assert 0 < await redis.ttl(f"diracx:groups:{group}") <= 60, "it has ended, and is kept to be seen"
        assert "callback" not in SEEN


async def test_P33_on_failure_comes_once_when_all_have_ended(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(GROUP_TASKS, redis_url=redis_url, workers=2) as system:
        children = [Fails(), *(Locked(number) for number in range(10)), Fails()]
        await spawn_with_callback(children, Callback(), on_failure=Callback("failure"))
        await system.drain()
        await until(lambda: "failure" in SEEN)  # retries are of the future, which drain() does not wait for
        await system.drain()
    assert SEEN[-1] == "failure"
    assert SEEN.count("failure") == 1
    assert "callback" not in SEEN
    assert await redis.keys("diracx:groups*") == []


async def test_a_failed_child_that_succeeds_later_counts_as_successful(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(GROUP_TASKS, redis_url=redis_url, workers=0), brokers(redis_url) as (one, _):
        group = await spawn_with_callback([Child(1), Child(2)], Callback())
        [first, second], _ = await one.fetch(2)
        await one.settle([ended(first, "ValueError: no"), ended(second)])
        status = await read_group(redis, group)
        assert status is not None
        assert (status.state, status.pending) == (GroupState.FAILED, 0)
        # As a dead letter that is submitted again: the same message.
        await one.redis.xadd(first.stream, {"data": first.data})
        [again], _ = await one.fetch(2)
        await one.settle([ended(again)])
        assert await names(one) == ["test:Callback"]


async def test_P33_a_child_that_cannot_be_executed_fails_its_group(redis_url: str) -> None:
    async with TaskSystem(GROUP_TASKS, redis_url=redis_url, workers=0):
        await spawn_with_callback([Child(1), Fails()], Callback(), on_failure=Callback("failure"))
    async with TaskSystem([Child, Callback], redis_url=redis_url) as system:
        await system.drain()
    assert SEEN == [1, "failure"]


async def test_P33_a_return_value_that_cannot_be_serialised_does_not_stop_the_callback(redis_url: str) -> None:
    class Odd(BaseTask):
        async def execute(self) -> object:
            return object()

    class Deep(BaseTask):
        async def execute(self) -> list[Any]:
            value: list[Any] = []
            value.append(value)
            return value

    async with TaskSystem([*GROUP_TASKS, Odd, Deep], redis_url=redis_url) as system:
        await spawn_with_callback([Odd(), Deep(), Child(1)], Callback())
        await system.drain()
        assert SEEN == [1, "callback"]


async def test_P33_the_callback_of_an_empty_group_is_submitted_at_once(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(GROUP_TASKS, redis_url=redis_url) as system:
        await spawn_with_callback([], Callback())
        await spawn_with_callback([], Sum(), on_failure=Callback("never"))
        await system.drain()
    assert SEEN == ["callback"]
    assert await redis.keys("diracx:groups*") == []
