"""Routing of tasks to queues: by the operator, their class, their labels, or by default."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from diracx.tasks.plumbing import BaseTask, Priority, Size, TasksConfig
from diracx.tasks.plumbing.broker import RedisStreamBroker
from diracx.tasks.plumbing.broker.models import TaskMessage, submit_task
from diracx.tasks.plumbing.registry import TaskRegistry
from diracx.tasks.plumbing.submission.client import bound_to
from redis.asyncio import Redis


@dataclass
class Silent(BaseTask):
    """Says nothing of its queue."""


class Urgent(BaseTask):
    priority = Priority.REALTIME


class Normal(BaseTask):
    """Sets the default explicitly."""

    priority = Priority.NORMAL
    size = Size.MEDIUM


class Inherited(Urgent):
    size = Size.SMALL


REGISTRY = TaskRegistry({f"test:{each.__name__}": each for each in (Silent, Urgent, Normal, Inherited)})
LABELS = {"priority": "background", "size": Size.LARGE}
ROUTES: list[tuple[type[BaseTask], dict[str, Any], str]] = [
    (Silent, {}, "normal:medium"),
    (Silent, LABELS, "background:large"),
    (Silent, {"size": "small", "mine": 1}, "normal:small"),
    (Urgent, LABELS, "realtime:large"),
    (Normal, LABELS, "normal:medium"),
    (Inherited, LABELS, "realtime:small"),
]


def message(task_id: str, labels: dict[str, Any]) -> TaskMessage:
    return TaskMessage(task_id=task_id, task_name="test:Silent", labels=labels)


@pytest.fixture
async def broker(redis_url: str, redis: Redis) -> AsyncIterator[RedisStreamBroker]:
    made = RedisStreamBroker(redis_url)
    await made.startup()
    yield made
    await made.shutdown()
    await redis.flushall()


@pytest.mark.parametrize(("task_class", "labels", "queue"), ROUTES)
async def test_a_label_routes_a_task_unless_its_class_overrides_it(
    redis: Redis, broker: RedisStreamBroker, task_class: type[BaseTask], labels: dict[str, Any], queue: str
) -> None:
    with bound_to(broker, REGISTRY, None):
        await task_class().schedule(labels=labels)
    assert await redis.xlen(f"diracx:tasks:{queue}") == 1


async def test_the_operators_priority_overrides_a_label(redis: Redis, broker: RedisStreamBroker) -> None:
    config = TasksConfig.model_validate({"common": {"test:Silent": {"priority": "realtime"}}})
    with bound_to(broker, REGISTRY, config):
        await Silent().schedule(labels=LABELS)
    assert await redis.xlen("diracx:tasks:realtime:large") == 1


async def test_a_task_submitted_by_name_or_message_is_routed_by_its_labels(
    redis: Redis, broker: RedisStreamBroker
) -> None:
    await submit_task(broker, "test:Silent", labels=LABELS)
    await broker.enqueue(message("a", LABELS))
    assert await redis.xlen("diracx:tasks:background:large") == 2
    await submit_task(broker, "test:Silent", labels=LABELS, priority="realtime", size="small")
    assert await redis.xlen("diracx:tasks:realtime:small") == 1
    await submit_task(broker, "test:Silent")
    await broker.enqueue(message("b", {}))
    assert await redis.xlen("diracx:tasks:normal:medium") == 2


@pytest.mark.parametrize("labels", [{"priority": "urgent"}, {"size": 7}])
async def test_a_label_of_an_unknown_queue_sends_nothing(
    redis: Redis, broker: RedisStreamBroker, labels: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="the label"):
        await submit_task(broker, "test:Silent", labels=labels)
    with pytest.raises(ValueError, match="the label"):
        await broker.enqueue(message("a", labels))
    assert await redis.dbsize() == 0
