"""Cancellation of tasks in every state, without leftovers."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from diracx.tasks.plumbing import (
    ConcurrencyLimiter,
    TaskPlace,
    cancel_task,
    cancel_tasks,
    schedule_many,
    spawn_with_callback,
)
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys, scripts
from diracx.tasks.plumbing.broker.models import Settlement
from diracx.tasks.plumbing.broker.replies import ACCEPTED
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from support.cancelled_tasks import (
    TASKS,
    Fails,
    Gate,
    Hangs,
    Limited,
    Locked,
    failed_as_cancelled,
    nothing_is_left,
)
from support.standard_tasks import SEEN, Echo
from support.waiting import until

pytestmark = pytest.mark.event_loops("asyncio", "uvloop")


@pytest.fixture(autouse=True)
def _close_gate() -> None:
    Gate.event = asyncio.Event()


async def test_a_cancelled_queued_task_is_deleted_immediately_and_never_runs(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0) as system:
        ids = await schedule_many([Echo(number) for number in range(5)], labels={"result_ttl_seconds": 60})
        assert await cancel_task(ids[2]) is TaskPlace.QUEUED
        assert await redis.xlen("diracx:tasks:normal:medium") == 4
        await failed_as_cancelled(system, ids[2])
        assert await cancel_task(ids[2]) is TaskPlace.UNKNOWN
        await nothing_is_left_but_the_queue(redis)
    async with TaskSystem(TASKS, redis_url=redis_url) as system:
        await nothing_is_left(system)
    assert SEEN == [0, 1, 3, 4]


async def nothing_is_left_but_the_queue(redis: Redis) -> None:
    assert not await redis.exists(keys.CANCELLED)


async def test_a_cancelled_delayed_task_is_deleted_immediately(redis_url: str) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url) as system:
        task_id = await Echo(1).schedule(at_time=datetime.now(UTC) + timedelta(hours=1))
        assert await system.cancel(task_id) is TaskPlace.DELAYED
        await failed_as_cancelled(system, task_id)
        await nothing_is_left(system)
    assert SEEN == []


async def test_a_task_between_two_attempts_is_not_tried_again(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url) as system:
        task_id = await Fails().schedule()
        await until(lambda: redis.exists(keys.DELAYED))
        assert await system.cancel(task_id) is TaskPlace.RETRYING
        await failed_as_cancelled(system, task_id)
        await nothing_is_left(system)
    assert SEEN == ["attempt"]


async def test_a_cancelled_task_waiting_for_a_lock_is_deleted_and_the_next_waiter_gets_the_lock(
    redis_url: str, redis: Redis
) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url) as system:
        holder = await Locked(0).schedule()
        await until(lambda: 0 in SEEN)
        waiting = [await Locked(number).schedule() for number in range(1, 4)]
        await until(lambda: _is(redis.zcard(keys.DELAYED), 3))
        assert await system.cancel(waiting[0]) is TaskPlace.WAITING
        await failed_as_cancelled(system, waiting[0])
        Gate.event.set()
        assert (await system.result(holder)).return_value == 0
        await nothing_is_left(system)
    assert SEEN[0] == 0
    assert sorted(SEEN) == [0, 2, 3]


async def test_a_cancelled_task_waiting_for_quota_is_deleted(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url) as system:
        await schedule_many([Limited()])
        await until(lambda: "limited" in SEEN)
        task_id = await Limited().schedule()
        await until(lambda: redis.exists(keys.DELAYED))
        assert await system.cancel(task_id) is TaskPlace.WAITING
        await nothing_is_left(system)
    assert SEEN == ["limited"]


async def _is(call: Any, value: Any) -> bool:
    return bool(await call == value)


async def test_a_running_task_is_cancelled_within_a_second_and_not_retried(redis_url: str, redis: Redis) -> None:
    # Who only renewed his leases would hear of it after 200 s.
    async with TaskSystem(TASKS, redis_url=redis_url, workers=2, settings={"lease_seconds": 600}) as system:
        task_id, other = await Hangs().schedule(), await Hangs().schedule()
        await until(lambda: SEEN.count("begun") == 2)
        started = time.monotonic()
        assert await system.cancel(task_id) is TaskPlace.RUNNING
        await failed_as_cancelled(system, task_id)
        assert time.monotonic() - started < 10.0, "a second, and what a busy machine needs"
        assert SEEN == ["begun", "begun", "cancelled"]
        Gate.event.set()
        assert not (await system.result(other)).is_err
        await nothing_is_left(system)


async def test_a_cancelled_execution_releases_its_locks(redis_url: str) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url) as system:
        holder = await Locked(0).schedule()
        await until(lambda: 0 in SEEN)
        following = await Locked(1).schedule()
        assert await system.cancel(holder) is TaskPlace.RUNNING
        assert (await system.result(following)).return_value == 1
        await nothing_is_left(system)


async def mark(redis: Redis, task_id: str) -> None:
    """State after cancel.lua, without the notification."""
    await redis.zadd(keys.CANCELLED, {task_id: (time.time() + 60) * 1000})
    await redis.set(keys.ANY_CANCELLED, 1, px=60_000)


async def test_a_worker_that_missed_the_cancellation_finds_it_at_its_next_renewal(
    redis_url: str, redis: Redis
) -> None:
    settings = {"lease_seconds": 0.6}
    async with TaskSystem(TASKS, redis_url=redis_url, settings=settings) as system:
        task_id = await Hangs().schedule()
        await until(lambda: "begun" in SEEN)
        await mark(redis, task_id)
        await failed_as_cancelled(system, task_id)
        await nothing_is_left(system)


async def test_a_lost_connection_is_reopened(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=1) as system:
        await redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        await until(lambda: _subscribers(redis))
        task_id = await Hangs().schedule()
        await until(lambda: "begun" in SEEN)
        await system.cancel(task_id)
        await failed_as_cancelled(system, task_id)
        await nothing_is_left(system)


async def _subscribers(redis: Redis) -> bool:
    [(_, count)] = await redis.pubsub_numsub(keys.CANCELLED)
    return bool(count)


@pytest.mark.leaves_keys("diracx:tasks:alive", "diracx:tasks:leases")  # the dead one may not be off the list yet
async def test_a_task_marked_as_cancelled_is_dropped_when_it_is_fetched(redis_url: str, redis: Redis) -> None:
    """The worker that had it died, or it came back to the queue just before it was found."""
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0) as system:
        first, second, third = await schedule_many([Echo(1), Locked(2), Echo(3)])
        dead = RedisStreamBroker(redis_url, consumer_name="dead")
        [delivery], _ = await dead.fetch(1)
        assert not delivery.cancelled
        await redis.zadd(keys.ALIVE, {"dead": 0})
        assert await cancel_tasks([first]) == {first: TaskPlace.RUNNING}
        await dead.shutdown()
        await mark(redis, second)
    async with TaskSystem(TASKS, redis_url=redis_url) as system:
        for task_id in (first, second):
            await failed_as_cancelled(system, task_id)
        assert (await system.result(third)).return_value == 3
        await nothing_is_left(system)
    assert SEEN == [3]


async def test_a_task_that_ended_before_it_could_be_cancelled_leaves_no_mark(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0) as system:
        task_id = await Echo(1).schedule()
        [delivery], _ = await system.broker.fetch(1)
        assert await cancel_task(task_id) is TaskPlace.RUNNING
        assert await redis.zscore(keys.CANCELLED, task_id)
        assert 0 < await redis.ttl(keys.CANCELLED) <= 604_800
        assert await system.broker.settle([Settlement(delivery)]) == [ACCEPTED]
        assert not await redis.exists(keys.CANCELLED)
        await system.broker.leave()


class OneSlot(ConcurrencyLimiter):
    limit = 1


@dataclass
class Slotted(Locked):
    @property
    def execution_locks(self) -> list[BaseLock]:
        return [OneSlot(JOB, "contended")]


@pytest.mark.parametrize("kind", [Locked, Slotted])
@pytest.mark.parametrize("by_a_worker", [False, True])
async def test_a_cancelled_task_passes_its_granted_lock_to_the_next(
    redis_url: str, redis: Redis, kind: type[Locked], by_a_worker: bool
) -> None:
    [held] = kind(0).execution_locks
    assert await held.acquire(redis)
    # The timers are far away: only a grant can resume a task.
    settings = {"lock_retry_seconds": 3600}
    async with TaskSystem([kind], redis_url=redis_url, settings=settings) as system:
        first = await kind(1).schedule()
        await until(lambda: _is(redis.zcard(keys.DELAYED), 1))
        second = await kind(2).schedule()
        await until(lambda: _is(redis.zcard(keys.DELAYED), 2))
    async with TaskSystem([kind], redis_url=redis_url, workers=0) as system:
        await held.release(redis)
        if by_a_worker:
            await mark(redis, first)
        else:
            assert await system.cancel(first) is TaskPlace.QUEUED
    async with TaskSystem([kind], redis_url=redis_url, settings=settings) as system:
        await failed_as_cancelled(system, first)
        assert (await system.result(second)).return_value == 2
        await nothing_is_left(system)


async def test_P33_a_cancelled_child_has_failed_for_its_group(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0):
        await spawn_with_callback(
            [Echo("child"), Hangs(), Echo("queued")], Echo("callback"), on_failure=Echo("failure")
        )
        [_, (_, hangs), (_, queued)] = await redis.xrange("diracx:tasks:normal:medium")
        assert await cancel_task(_id_of(queued[b"data"])) is TaskPlace.QUEUED
    async with TaskSystem(TASKS, redis_url=redis_url) as system:
        await until(lambda: "begun" in SEEN)
        assert await system.cancel(_id_of(hangs[b"data"])) is TaskPlace.RUNNING
        await nothing_is_left(system)
    assert SEEN == ["child", "begun", "cancelled", "failure"]
    assert await redis.keys("diracx:groups*") == []


def _id_of(data: bytes) -> str:
    from diracx.tasks.plumbing.broker.models import TaskMessage

    return TaskMessage.loadb(data).task_id


async def test_the_child_of_a_large_group_can_be_cancelled_on_its_way_to_the_queue(
    redis_url: str, redis: Redis
) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0) as system:
        child = {"task": "the-child", "staged": b"diracx:tasks:normal:medium\n" + _message("the-child")}
        fields = {"total": 1, "ttl_ms": 60_000, "callback_name": "test:Echo"}
        fields |= {"callback_stream": "diracx:tasks:normal:medium", "callback": _message("the-callback")}
        await scripts.group(redis, "the-group", fields, [], last=False)
        await scripts.group(redis, "the-group", None, [child], last=True)
        assert await redis.exists(keys.GROUP_OUTBOX)
        assert await system.cancel("the-child") is TaskPlace.QUEUED
        await failed_as_cancelled(system, "the-child")


def _message(task_id: str) -> bytes:
    from diracx.tasks.plumbing.broker.labels import LABEL_GROUP
    from diracx.tasks.plumbing.broker.models import TaskMessage

    return TaskMessage(task_id=task_id, task_name="test:Echo", labels={LABEL_GROUP: "the-group"}).dumpb()


async def test_a_running_task_can_be_cancelled_after_the_server_has_lost_its_data(
    redis_url: str, redis: Redis
) -> None:
    settings = {"lease_seconds": 0.6}
    async with TaskSystem(TASKS, redis_url=redis_url, workers=2, settings=settings) as system:
        task_id = await Hangs().schedule()
        await until(lambda: "begun" in SEEN)
        await redis.flushall()
        await until(lambda: _is_noted(redis))
        assert await system.cancel(task_id) is TaskPlace.UNKNOWN
        await until(lambda: "cancelled" in SEEN)
        await nothing_is_left(system)


async def _is_noted(redis: Redis) -> bool:
    records = await redis.keys(keys.HELD_PREFIX + "*")
    fields = [field for record in records for field in await redis.hkeys(record)]
    return any(field.startswith(b"entry:") for field in fields)
