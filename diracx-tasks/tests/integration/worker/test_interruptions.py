"""Restarts of interrupted tasks: bounded, and not for tasks that must not start twice."""

from __future__ import annotations

import asyncio

import pytest
from diracx.tasks.plumbing import (
    BaseTask,
    ExponentialBackoff,
    MutexLock,
)
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.plumbing.broker.models import TaskMessage
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.testing import TaskSystem
from redis import Redis as SyncRedis
from redis.asyncio import Redis
from support.standard_tasks import SEEN, InterruptedOnce
from support.waiting import until

pytestmark = pytest.mark.event_loops("asyncio", "uvloop")


@pytest.mark.parametrize("swallows", [False, True], ids=["is cancelled", "swallows its cancellation"])
async def test_P24_an_execution_that_loses_its_lock_has_not_succeeded_and_is_started_again_whatever_its_policy(
    redis_url: str, redis: Redis, swallows: bool
) -> None:
    async with TaskSystem([InterruptedOnce], redis_url=redis_url) as system:
        task_id = await InterruptedOnce(swallows=swallows).schedule()
        await until(lambda: SEEN)
        await redis.set("lock:mutex:job:lost", "another", px=1_000)
        await until(lambda: redis.exists(keys.DELAYED))
        assert len(SEEN) == 1, "it waits for its turn, as anybody does"
        assert (await system.result(task_id)).return_value == "the second time"
        assert len(SEEN) == 2


async def test_a_task_that_is_interrupted_each_time_ends_as_a_dead_letter(redis_url: str, redis: Redis) -> None:
    class Unlucky(BaseTask):
        vo = "lhcb"

        @property
        def execution_locks(self) -> list[BaseLock]:
            return [MutexLock(JOB, "unlucky", ttl_ms=300)]

        async def execute(self) -> None:
            with SyncRedis.from_url(redis_url) as client:  # at once: a client of asyncio may swallow what comes
                client.set("lock:mutex:job:unlucky", "another", px=100)
            await asyncio.Event().wait()

    async with TaskSystem([Unlucky], redis_url=redis_url) as system:
        result = await system.result(await Unlucky().schedule())
        assert result.error is not None
        assert result.error["type"] == "LockLostError"
        await system.drain()
        assert system.task_db is not None
        async with system.task_db as db:
            [dead_letter] = await db.search()
    assert (dead_letter["reason"], dead_letter["vo"]) == ("interrupted", "lhcb")
    assert [attempt["interrupted"] for attempt in dead_letter["attempts"]] == [True, True, True]


async def test_a_task_that_must_not_begin_twice_fails_when_it_is_interrupted(redis_url: str, redis: Redis) -> None:
    class Once(BaseTask):
        at_most_once = True
        retry_policy = ExponentialBackoff(base_delay_seconds=1, max_retries=3)

        @property
        def execution_locks(self) -> list[BaseLock]:
            return [MutexLock(JOB, "once", ttl_ms=300)]

        async def execute(self) -> None:
            SEEN.append(1)
            await asyncio.Event().wait()

    async with TaskSystem([Once], redis_url=redis_url) as system:
        task_id = await Once().schedule()
        await until(lambda: SEEN)
        await redis.set("lock:mutex:job:once", "another", px=100)
        result = await system.result(task_id)
        assert result.error is not None
        assert result.error["type"] == "LockLostError"
        assert "lock:mutex:job:once" in result.error["message"]
        await system.drain()
    assert SEEN == [1]


async def test_a_task_that_must_not_start_twice_fails_when_its_worker_was_lost(
    redis_url: str, redis: Redis
) -> None:
    class Once(BaseTask):
        at_most_once = True
        dlq_eligible = True
        vo = "lhcb"

        async def execute(self) -> None:
            SEEN.append(1)

    async with TaskSystem([Once], redis_url=redis_url) as system:
        message = TaskMessage(task_id="once", task_name="test:Once")
        await redis.xadd("diracx:tasks:normal:medium", {"data": message.dumpb(), "deaths": "1"})
        result = await system.result("once")
        assert result.error is not None
        assert result.error["type"] == "WorkerStoppedError"
        await system.drain()
        assert system.task_db is not None
        async with system.task_db as db:
            [dead_letter] = await db.search()
    assert (dead_letter["reason"], dead_letter["vo"], SEEN) == ("exhausted", "lhcb", [])
