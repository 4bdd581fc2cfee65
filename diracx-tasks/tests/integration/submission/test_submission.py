"""Submission of tasks by other code, by tasks, and in groups; refused submissions."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from diracx.tasks.plumbing import (
    BaseTask,
    CallbackSpawner,
    LockedObjectType,
    Priority,
    SendTaskError,
    Size,
    schedule_many,
    spawn_with_callback,
    task_broker,
)
from diracx.tasks.plumbing.broker.models import submit_task
from diracx.tasks.plumbing.broker.redis_streams import RedisStreamBroker
from diracx.tasks.plumbing.lock_registry import JOB, TASK
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from support.standard_tasks import SEEN, Background, Echo

pytestmark = pytest.mark.event_loops("asyncio", "uvloop")


@dataclass
class Urgent(Echo):
    priority = Priority.REALTIME
    size = Size.SMALL


async def test_P1_tasks_and_callbacks_go_to_the_queue_of_their_class(redis_url: str, redis: Redis) -> None:
    async with TaskSystem([Urgent, Background], redis_url=redis_url, workers=0):
        await Urgent(1).schedule()
        await Background(1).schedule()
        await schedule_many([Background(2), Urgent(2)])
        await Urgent(3).schedule(at_time=datetime.now(UTC) - timedelta(seconds=1))
        await spawn_with_callback([], Urgent(4))
    async with TaskSystem([Echo], redis_url=redis_url, workers=0) as system:
        await system.broker.promote()
    assert await redis.xlen("diracx:tasks:realtime:small") == 4
    assert await redis.xlen("diracx:tasks:background:medium") == 2
    await redis.delete("diracx:tasks:realtime:small", "diracx:tasks:background:medium")


@pytest.mark.parametrize(
    "labels", [{"result_ttl_seconds": 0}, {"result_ttl_seconds": "60"}, {"attempts": 3}, {"group_id": 7}]
)
async def test_labels_that_mean_something_are_checked_when_submitted(
    redis_url: str, labels: dict[str, Any]
) -> None:
    async with TaskSystem([Echo], redis_url=redis_url, workers=0):
        with pytest.raises(ValueError, match=f"the label {next(iter(labels))}"):
            await Echo(1).schedule(labels=labels)


# --- groups ----------------------------------------------------------------------------------------------


async def test_callback_runs_once_after_all_children(redis_url: str) -> None:
    async with TaskSystem([Echo, Urgent], redis_url=redis_url) as system:
        await spawn_with_callback([Echo(number) for number in range(20)], Urgent("callback"))
        await system.drain()
    assert SEEN[-1] == "callback"
    assert len(SEEN) == 21


async def test_callback_spawner_is_injected_into_tasks(redis_url: str) -> None:
    class Parent(BaseTask):
        async def execute(self, spawn: CallbackSpawner) -> str:
            return await spawn([Echo("child")], Echo("callback"))

    async with TaskSystem([Parent, Echo], redis_url=redis_url) as system:
        result = await system.result(await Parent().schedule())
        assert not result.is_err, result.error
        await system.drain()
    assert SEEN == ["child", "callback"]


async def test_P33_a_failed_child_fires_on_failure_instead(redis_url: str) -> None:
    class Fails(BaseTask):
        async def execute(self) -> None:
            raise ValueError

    async with TaskSystem([Echo, Fails], redis_url=redis_url) as system:
        await spawn_with_callback([Echo(1), Fails()], Echo("callback"), on_failure=Echo("failure"))
        await system.drain()
    assert sorted(map(str, SEEN)) == ["1", "failure"]


# --- binding and registry --------------------------------------------------------------------------------


async def test_schedule_without_a_broker_is_an_error_with_the_remedy() -> None:
    with pytest.raises(RuntimeError, match="task_broker"):
        await Echo(1).schedule()


async def test_plain_code_submits_through_task_broker(redis_url: str) -> None:
    async with task_broker(redis_url, {"test:Echo": Echo}):
        await Echo("from outside").schedule()
    async with TaskSystem([Echo], redis_url=redis_url) as system:
        await system.drain()
    assert SEEN == ["from outside"]


async def test_a_task_can_spawn_tasks(redis_url: str) -> None:
    class Parent(BaseTask):
        async def execute(self) -> str:
            return await Echo("child").schedule()

    async with TaskSystem([Parent, Echo], redis_url=redis_url) as system:
        child = (await system.result(await Parent().schedule())).return_value
        assert (await system.result(child)).return_value == "child"


async def test_an_unregistered_task_is_refused_with_the_way_out(redis_url: str) -> None:
    async with TaskSystem([Echo], redis_url=redis_url, workers=0):
        with pytest.raises(SendTaskError, match=r"Background is not a registered task: .*--module"):
            await Background(1).schedule()


async def test_an_unreachable_broker_is_a_send_task_error() -> None:
    broker = RedisStreamBroker("redis://127.0.0.1:1")
    with pytest.raises(SendTaskError, match="cannot submit test:Echo"):
        await submit_task(broker, "test:Echo")
    await broker.shutdown()


async def test_P28_two_categories_with_one_class_name_are_reported_with_both_origins() -> None:
    from diracx.tasks.plumbing.registry import TaskRegistry

    other = type("Echo", (Echo,), {"__module__": "elsewhere"})
    [line] = TaskRegistry({"a:Echo": Echo, "b:Echo": other, "b:Urgent": Urgent}).ambiguous_names()
    assert "a:Echo" in line
    assert "b:Echo (elsewhere)" in line
    assert TaskRegistry({"a:Echo": Echo, "b:Urgent": Urgent}).ambiguous_names() == []


async def test_two_classes_of_one_package_with_one_name_are_reported() -> None:
    from diracx.tasks.plumbing.registry import TaskRegistry

    registry = TaskRegistry({"a:Echo": type("Echo", (Echo,), {"__module__": "ext.one"})})
    registry.add("a:Echo", type("Echo", (Echo,), {"__module__": "diracx.tasks"}))  # overridden by the extension
    assert registry.ambiguous_names() == []
    registry.add("a:Echo", type("Echo", (Echo,), {"__module__": "ext.two"}))
    [line] = registry.ambiguous_names()
    assert "a:Echo is the name of several classes, in ext.one and ext.two" in line


def test_lock_object_types_are_strings() -> None:
    assert TASK == "task"
    assert LockedObjectType("job") == JOB
