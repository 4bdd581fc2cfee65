"""Callback groups: the callback comes once, after the last child, whatever happens to the children."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from diracx.tasks.plumbing import (
    BaseTask,
    ChildResults,
    ExponentialBackoff,
    MutexLock,
    fire_callback,
    spawn_with_callback,
)
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys, scripts
from diracx.tasks.plumbing.broker.cancel import TaskPlace
from diracx.tasks.plumbing.broker.groups import GroupState, list_groups, read_group
from diracx.tasks.plumbing.broker.models import Delivery, Settlement, TaskMessage
from diracx.tasks.plumbing.broker.redis_streams import GROUP_BATCH
from diracx.tasks.plumbing.cancellation import cancel_tasks
from diracx.tasks.plumbing.exceptions import ResultIsMissingError, TaskRejectedError
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.plumbing.messages.codec import loads
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from warm_commands import WarmCommands

sys.path.insert(0, str(Path(__file__).parent))
from crashing_tasks import LEASE_SECONDS, Marks
from crashing_tasks import TASKS as CRASHING_TASKS

seen: list[Any] = []


@pytest.fixture(autouse=True)
def _forget() -> None:
    seen.clear()


@dataclass
class Child(BaseTask):
    number: int

    async def execute(self) -> int:
        seen.append(self.number)
        return self.number * self.number


@dataclass
class Callback(BaseTask):
    text: str = "callback"

    async def execute(self) -> None:
        seen.append(self.text)


@dataclass
class Fails(BaseTask):
    retry_policy = ExponentialBackoff(base_delay_seconds=0.02, max_retries=2)

    async def execute(self) -> None:
        seen.append("attempt")
        raise ValueError("there is no such site")


@dataclass
class Locked(BaseTask):
    number: int

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(JOB, "of-the-group")]

    async def execute(self) -> None:
        await asyncio.sleep(0)
        seen.append(self.number)


@dataclass
class Sum(BaseTask):
    async def execute(self, results: ChildResults) -> list[Any]:
        return [result.error["type"] if result.error else result.return_value for result in results.values()]


TASKS = [Child, Callback, Fails, Locked, Sum]


async def test_P32_waiting_for_a_lock_is_no_end_of_a_child(redis_url: str) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=3) as system:
        await spawn_with_callback([Locked(number) for number in range(30)], Callback())
        await system.drain()
    assert sorted(seen[:-1]) == list(range(30))
    assert seen[-1] == "callback"


# --- exactly once ----------------------------------------------------------------------------------------


@asynccontextmanager
async def brokers(redis_url: str) -> AsyncIterator[tuple[RedisStreamBroker, RedisStreamBroker]]:
    """Two workers' brokers, moved by hand."""
    pair = RedisStreamBroker(redis_url, consumer_name="one"), RedisStreamBroker(redis_url, consumer_name="two")
    try:
        yield pair
    finally:
        for broker in pair:
            await broker.redis.delete(keys.ALIVE)
            await broker.leave()
            await broker.shutdown()


def ended(delivery: Delivery, error: str | None = None) -> Settlement:
    assert delivery.data is not None
    message = TaskMessage.loadb(delivery.data)
    group = {"id": message.labels["group_id"], "child": message.task_id, **({"error": error} if error else {})}
    return Settlement(delivery, group=group)


async def names(broker: RedisStreamBroker) -> list[str]:
    """Take all messages from the queue and return their names."""
    deliveries, _ = await broker.fetch(100)
    await broker.settle([Settlement(delivery) for delivery in deliveries])
    return [TaskMessage.loadb(delivery.data or b"").task_name for delivery in deliveries]


async def test_P33_a_redelivered_child_is_subtracted_once(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0), brokers(redis_url) as (one, two):
        group = await spawn_with_callback([Child(1), Child(2)], Callback())
        [first], _ = await one.fetch(1)
        # The worker is taken for dead: another one runs the child, and the first comes back.
        await redis.zadd(keys.ALIVE, {"one": 0})
        [again], *_ = await two.reclaim(1)
        assert again.deliveries == 2
        assert await one.settle([ended(first)]) == [False]
        status = await read_group(redis, group)
        assert status is not None
        assert (status.pending, status.succeeded) == (2, 0)
        assert await two.settle([ended(again)]) == [True]
        # A settlement that is repeated (its answer was lost), and a child that was executed twice after all.
        assert await two.settle([ended(again), ended(again)]) == [False, False]
        await two.redis.xadd(again.stream, {"data": again.data})
        [second, twin], _ = await two.fetch(2)
        assert await two.settle([ended(twin)]) == [True]
        status = await read_group(redis, group)
        assert status is not None
        assert (status.pending, status.succeeded) == (1, 1)
        assert await two.settle([ended(second)]) == [True]
        assert await names(two) == ["test:Callback"]
        assert await read_group(redis, group) is None
        assert not await fire_callback(redis, group)
        assert await names(two) == []


@pytest.mark.leaves_keys("diracx:tasks:*")  # the name of the dead worker, should nobody have looked again
async def test_P33_a_child_whose_worker_was_killed_runs_again_and_the_callback_comes_once(
    redis_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch, warm_commands: WarmCommands
) -> None:
    monkeypatch.setenv("TEST_REDIS_URL", redis_url)
    async with TaskSystem(CRASHING_TASKS, redis_url=redis_url, workers=0):
        await spawn_with_callback([Marks("a"), Marks("b", ends=True)], Marks("callback", ends=True))
    script = Path(__file__).with_name("crashing_tasks.py")
    process = warm_commands.worker(script, redis_url, env={**os.environ, "TEST_HANGS": "1"})
    try:
        deadline = time.monotonic() + 30
        while await redis.exists("started:a", "started:b") < 2:
            assert time.monotonic() < deadline, "the children do not start"
            await asyncio.sleep(0.01)
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


async def test_firing_by_hand_happens_once_and_children_that_end_later_change_nothing(
    redis_url: str, redis: Redis
) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0) as submitting:
        group = await spawn_with_callback([Child(1), Child(2)], Callback())
        assert await fire_callback(redis, group, submitting.broker)
        assert not await fire_callback(redis, group)
    async with TaskSystem(TASKS, redis_url=redis_url) as system:
        await system.drain()
    assert sorted(map(str, seen)) == ["1", "2", "callback"]


# --- failures --------------------------------------------------------------------------------------------


async def test_P33_a_child_that_failed_for_good_marks_the_group_and_retries_do_not(
    redis_url: str, redis: Redis
) -> None:
    gate = asyncio.Event()

    class Waits(BaseTask):
        async def execute(self) -> None:
            await gate.wait()

    async with TaskSystem([*TASKS, Waits], redis_url=redis_url, scheduler=True) as system:
        group = await spawn_with_callback([Child(1), Fails(), Waits()], Callback(), ttl_seconds=60)
        while (status := await read_group(redis, group)) is None or not status.failed:
            if seen.count("attempt") in (1, 2):
                assert status is not None
                assert status.state is GroupState.PENDING, "a retry is no failure"
            await asyncio.sleep(0.005)
        assert seen.count("attempt") == 3
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
        assert "callback" not in seen


async def test_P33_on_failure_comes_once_when_all_have_ended(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=2) as system:
        children = [Fails(), *(Locked(number) for number in range(10)), Fails()]
        await spawn_with_callback(children, Callback(), on_failure=Callback("failure"))
        await system.drain()
        while "failure" not in seen:  # retries are of the future, which drain() does not wait for
            await asyncio.sleep(0.005)
        await system.drain()
    assert seen[-1] == "failure"
    assert seen.count("failure") == 1
    assert "callback" not in seen
    assert await redis.keys("diracx:groups*") == []


async def test_a_failed_child_that_succeeds_after_all_mends_its_group(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0), brokers(redis_url) as (one, _):
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
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0):
        await spawn_with_callback([Child(1), Fails()], Callback(), on_failure=Callback("failure"))
    async with TaskSystem([Child, Callback], redis_url=redis_url) as system:
        await system.drain()
    assert seen == [1, "failure"]


async def test_P33_a_return_value_that_cannot_travel_does_not_stop_the_callback(redis_url: str) -> None:
    class Odd(BaseTask):
        async def execute(self) -> object:
            return object()

    class Deep(BaseTask):
        async def execute(self) -> list[Any]:
            value: list[Any] = []
            value.append(value)
            return value

    async with TaskSystem([*TASKS, Odd, Deep], redis_url=redis_url) as system:
        await spawn_with_callback([Odd(), Deep(), Child(1)], Callback())
        await system.drain()
        assert seen == [1, "callback"]


async def test_P33_an_empty_group_calls_back_at_once(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url) as system:
        await spawn_with_callback([], Callback())
        await spawn_with_callback([], Sum(), on_failure=Callback("never"))
        await system.drain()
    assert seen == ["callback"]
    assert await redis.keys("diracx:groups*") == []


# --- results of the children -----------------------------------------------------------------------------


class Collects(BaseTask):
    retry_policy = ExponentialBackoff(base_delay_seconds=0.01, max_retries=3)

    async def execute(self, results: ChildResults) -> None:
        seen.append([result.return_value for result in results.values()])
        if len(seen) < 3:
            raise ValueError("not yet")


class Squares(Child):
    async def execute(self) -> int:
        await asyncio.sleep(0.001 * (5 - self.number % 5))
        return self.number**2


async def test_the_callback_gets_the_results_in_the_order_of_the_children_at_each_attempt(
    redis_url: str, redis: Redis
) -> None:
    async with TaskSystem([Squares, Collects], redis_url=redis_url, workers=2, scheduler=True) as system:
        await spawn_with_callback([Squares(number) for number in range(25)], Collects())
        while len(seen) < 3:
            await asyncio.sleep(0.005)
        await system.drain()
    assert seen == [[number**2 for number in range(25)]] * 3
    assert await redis.keys("diracx:groups*") == [], "they are kept no longer than the callback"


async def test_on_failure_gets_the_errors_too(redis_url: str, redis: Redis) -> None:
    class Odd(BaseTask):
        async def execute(self) -> object:
            return object()

    class Reports(BaseTask):
        async def execute(self, results: ChildResults) -> None:
            seen.extend(
                result.error["type"] if result.error else result.return_value for result in results.values()
            )

    tasks = [Squares, Odd, Reports, Callback]
    async with TaskSystem([*tasks, Fails], redis_url=redis_url, workers=0):
        await spawn_with_callback([Squares(3), Fails(), Odd()], Callback(), on_failure=Reports())
    async with TaskSystem(tasks, redis_url=redis_url) as system:
        await system.drain()
    assert seen == [9, TaskRejectedError.__name__, "TypeError"]
    assert await redis.keys("diracx:groups*") == []


async def test_a_cancelled_callback_releases_the_results_of_its_children(redis_url: str, redis: Redis) -> None:
    class Waits(Collects):
        @property
        def execution_locks(self) -> list[BaseLock]:
            return [MutexLock(JOB, "busy")]

    busy = MutexLock(JOB, "busy")
    assert await busy.acquire(redis)
    async with TaskSystem([Child, Waits], redis_url=redis_url) as system:
        await spawn_with_callback([Child(1)], Waits())
        while not (waiting := await redis.hkeys(keys.DELAYED_DATA)):
            await asyncio.sleep(0.005)
        assert await redis.keys("diracx:groups:*"), "the results"
        [callback] = [task.decode() for task in waiting]
        assert await cancel_tasks([callback]) == {callback: TaskPlace.WAITING}
        assert await redis.keys("diracx:groups:*") == []
        await system.drain()
    await busy.release(redis)


async def test_results_are_kept_only_for_callbacks_that_ask(redis_url: str, redis: Redis) -> None:
    gate = asyncio.Event()

    class Waits(BaseTask):
        async def execute(self) -> None:
            await gate.wait()

    async with TaskSystem([Child, Waits, Callback], redis_url=redis_url) as system:
        group = await spawn_with_callback([Child(1), Waits()], Callback())
        while not seen:
            await asyncio.sleep(0.005)
        assert sorted(await redis.keys("diracx:groups:*")) == [
            f"diracx:groups:{group}".encode(),
            f"diracx:groups:{group}:pending".encode(),
        ]
        gate.set()
        await system.drain()


async def test_child_results_outside_a_group_are_an_error_that_says_so(redis_url: str, redis: Redis) -> None:
    async with TaskSystem([Sum, Child], redis_url=redis_url) as system:
        result = await system.result(await Sum().schedule())
        assert result.error is not None
        assert "spawn_with_callback" in result.error["message"]
    async with TaskSystem([Sum, Child], redis_url=redis_url, workers=0):
        group = await spawn_with_callback([Child(1)], Sum())
        assert await fire_callback(redis, group)
        await redis.delete(f"diracx:groups:{group}:children")
        [data] = [f[b"data"] for _, f in await redis.xrange("diracx:tasks:normal:medium") if b":Sum" in f[b"data"]]
    async with TaskSystem([Sum, Child], redis_url=redis_url) as system:
        result = await system.result(loads(data)["task_id"])
        assert result.error is not None
        assert result.error["type"] == ResultIsMissingError.__name__


async def test_a_callback_can_be_tested_without_any_group() -> None:
    from diracx.tasks.plumbing.broker.models import TaskResult

    assert await Sum().execute({"a": TaskResult.from_value(1, 0.1)}) == [1]


# --- large groups ----------------------------------------------------------------------------------------

LARGE = 10_000


async def test_a_group_of_10_000_holds_up_the_server_only_for_moments(redis_url: str, redis: Redis) -> None:
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
            seen.append((count, sum(result.return_value for result in results.values())))

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
    assert seen == [(LARGE, sum(range(LARGE)))]
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


async def test_a_crash_amid_the_submission_leaves_nothing_that_runs_and_nothing_that_stays(
    redis_url: str, redis: Redis
) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url) as system:
        await scripts.group(redis, "the-group", FIELDS, [staged(system.broker, n) for n in range(2)], last=False)
        # The submitter is dead. Nobody may start its children, or its callback.
        status = await read_group(redis, "the-group")
        assert status is not None
        assert (status.state, status.pending) == (GroupState.SUBMITTING, 4)
        assert not await fire_callback(redis, "the-group")
        await system.result(await Child(100).schedule())
        await system.drain()
        assert seen == [100]
        for key in await redis.keys("diracx:groups*"):
            assert 0 < await redis.ttl(key) <= 600, key
        assert not await redis.exists(keys.GROUP_OUTBOX)
        # And if it lives but was too slow, it learns that its group is no more.
        await redis.delete("diracx:groups:the-group")
        reply = await scripts.group(redis, "the-group", None, [staged(system.broker, 3)], last=True)
        assert reply == -1


async def test_a_crash_after_the_last_child_has_arrived_leaves_the_rest_to_others(
    redis_url: str, redis: Redis
) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0) as submitting:
        broker = submitting.broker
        await scripts.group(redis, "the-group", FIELDS, [staged(broker, n) for n in range(3)], last=False)
        assert await scripts.group(redis, "the-group", None, [staged(broker, 3)], last=True) == 2
        assert await redis.xlen("diracx:tasks:normal:medium") == 0
    async with TaskSystem(TASKS, redis_url=redis_url) as system:
        await system.drain()
    assert seen == [0, 1, 2, 3, "callback"]


async def test_a_large_group_starts_when_all_of_it_has_arrived(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url) as system:
        await spawn_with_callback([Child(number) for number in range(2 * GROUP_BATCH + 1)], Callback())
        await system.drain()
    assert sorted(seen[:-1]) == list(range(2 * GROUP_BATCH + 1))
    assert seen[-1] == "callback"


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
    assert seen == ["callback"]


async def test_the_end_or_retry_of_a_child_renews_the_life_of_its_group(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0), brokers(redis_url) as (one, _):
        group = await spawn_with_callback([Child(1), Child(2)], Callback())
        deliveries, _ = await one.fetch(2)
        for settlement in (ended(deliveries[0]), Settlement(deliveries[1], group={"id": group})):
            for key in await redis.keys("diracx:groups*"):
                await redis.expire(key, 100)
            assert await one.settle([settlement]) == [True]
            for key in await redis.keys("diracx:groups*"):
                assert await redis.ttl(key) > 86_400


async def test_a_group_that_cannot_be_submitted_leaves_no_keys(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0):
        with pytest.raises(TypeError, match="object"):
            await spawn_with_callback([Child(1), Child(object())], Callback())  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="ttl_seconds must be positive, not 0"):
            await spawn_with_callback([Child(1)], Callback(), ttl_seconds=0)
    assert await redis.keys("diracx:groups*") == []
    assert await redis.keys("diracx:tasks:*:*") == []
