"""Results of children are passed to the callback in order, if requested."""

from __future__ import annotations

import asyncio

from diracx.tasks.plumbing import (
    BaseTask,
    ChildResults,
    ExponentialBackoff,
    MutexLock,
    fire_callback,
    spawn_with_callback,
)
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.plumbing.broker.cancel import TaskPlace
from diracx.tasks.plumbing.cancellation import cancel_tasks
from diracx.tasks.plumbing.exceptions import ResultIsMissingError, TaskRejectedError
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.plumbing.messages.codec import loads
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from support.grouped_tasks import Callback, Child, Fails, Sum
from support.standard_tasks import SEEN
from support.waiting import until

# --- results of the children -----------------------------------------------------------------------------


class Collects(BaseTask):
    retry_policy = ExponentialBackoff(base_delay_seconds=0.01, max_retries=3)

    async def execute(self, results: ChildResults) -> None:
        SEEN.append([result.return_value for result in results.values()])
        if len(SEEN) < 3:
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
        await until(lambda: len(SEEN) >= 3)
        await system.drain()
    assert [[number**2 for number in range(25)]] * 3 == SEEN
    assert await redis.keys("diracx:groups*") == [], "they are kept no longer than the callback"


async def test_on_failure_gets_the_errors_too(redis_url: str, redis: Redis) -> None:
    class Odd(BaseTask):
        async def execute(self) -> object:
            return object()

    class Reports(BaseTask):
        async def execute(self, results: ChildResults) -> None:
            SEEN.extend(
                result.error["type"] if result.error else result.return_value for result in results.values()
            )

    tasks = [Squares, Odd, Reports, Callback]
    async with TaskSystem([*tasks, Fails], redis_url=redis_url, workers=0):
        await spawn_with_callback([Squares(3), Fails(), Odd()], Callback(), on_failure=Reports())
    async with TaskSystem(tasks, redis_url=redis_url) as system:
        await system.drain()
    assert [9, TaskRejectedError.__name__, "TypeError"] == SEEN
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
        waiting = await until(lambda: redis.hkeys(keys.DELAYED_DATA))
        assert await redis.keys("diracx:groups:*"), "the results"
        [callback] = [task.decode() for task in waiting]
        assert await cancel_tasks([callback]) == {callback: TaskPlace.WAITING}
        assert await redis.keys("diracx:groups:*") == []
        await system.drain()
    await busy.release(redis)


async def test_results_are_stored_only_for_callbacks_that_request_them(redis_url: str, redis: Redis) -> None:
    gate = asyncio.Event()

    class Waits(BaseTask):
        async def execute(self) -> None:
            await gate.wait()

    async with TaskSystem([Child, Waits, Callback], redis_url=redis_url) as system:
        group = await spawn_with_callback([Child(1), Waits()], Callback())
        await until(lambda: SEEN)
        assert sorted(await redis.keys("diracx:groups:*")) == [
            f"diracx:groups:{group}".encode(),
            f"diracx:groups:{group}:pending".encode(),
        ]
        gate.set()
        await system.drain()


async def test_child_results_outside_a_group_are_a_clear_error(redis_url: str, redis: Redis) -> None:
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
