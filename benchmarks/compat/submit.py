"""Submits numbered tasks, with whichever version is installed: `python -m benchmarks.compat.submit FIRST SET`."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from diracx.tasks.plumbing import spawn_with_callback
from diracx.tasks.plumbing.broker import RedisStreamBroker

from .numbered import TASKS, Callback, Child, Flaky, HeldSmall, Plain, Slow

#: Of each kind, in one set.
PLAIN, SLOW, FLAKY, SOON, LATER, GROUPS, CHILDREN, HELD = 30, 10, 10, 10, 10, 2, 4, 24

_WITHOUT_GROUPS = {"Plain": PLAIN + SOON + LATER, "Slow": SLOW, "Flaky": FLAKY}
#: Set -> how many of each kind end.
SETS = {
    "all": _WITHOUT_GROUPS | {"Child": GROUPS * CHILDREN, "Callback": GROUPS},
    "without groups": _WITHOUT_GROUPS,
    "held": {"HeldSmall": HELD},
}


def expected(first: int, chosen: str) -> set[tuple[str, int]]:
    """All ends that tasks of the set note."""
    return {(kind, first + number) for kind, many in SETS[chosen].items() for number in range(many)}


@asynccontextmanager
async def bound(url: str) -> AsyncIterator[Any]:
    """A broker to which the tasks are bound."""
    broker = RedisStreamBroker(url)
    await broker.startup()
    try:
        try:
            from diracx.tasks.plumbing.base_task import use_broker
            from diracx.tasks.plumbing.config import TasksConfig
            from diracx.tasks.plumbing.registry import TaskRegistry
            from diracx.tasks.plumbing.submission.client import Binding
        except ImportError:  # the published package
            from diracx.tasks.plumbing import BaseTask, factory, load_task_registry
            from redis.asyncio import Redis

            published: Any = factory, BaseTask, broker  # which mypy does not know
            bindings, _ = published[0].create_task_bindings(broker, load_task_registry())
            published[1].bind_broker(bindings)
            yield {"redis": Redis(connection_pool=published[2].connection_pool)}
        else:
            registry = TaskRegistry.of({f"numbered:{task.__name__}": task for task in TASKS})
            with use_broker(lambda: Binding(broker, registry, TasksConfig())):
                yield {}
    finally:
        await broker.shutdown()


async def submit(url: str, first: int, chosen: str) -> None:
    """Submit the set, with numbers that begin with this."""
    now = datetime.now(UTC)
    async with bound(url) as options:
        if chosen == "held":
            for number in range(HELD):
                await HeldSmall(first + number).schedule()
            return
        for task, many in ((Slow, SLOW), (Flaky, FLAKY), (Plain, PLAIN)):
            for number in range(many):
                await task(first + number).schedule()
        for number in range(SOON + LATER):
            at_time = now + timedelta(seconds=2 if number < SOON else 9)
            await Plain(first + PLAIN + number).schedule(at_time=at_time)
        for group in range(SETS[chosen].get("Callback", 0)):
            children = [Child(first + group * CHILDREN + number) for number in range(CHILDREN)]
            await spawn_with_callback(children, Callback(first + group), **options)


if __name__ == "__main__":
    asyncio.run(submit(os.environ["DIRACX_TASKS_REDIS_URL"], int(sys.argv[1]), sys.argv[2]))
