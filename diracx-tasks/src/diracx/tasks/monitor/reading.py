"""Reading what goes on. Nothing here looks through all there is: counts, and pages with a limit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..plumbing.broker.groups import GroupStatus
from .models import (
    DelayedTask,
    DelayReason,
    Failure,
    Lock,
    Page,
    Point,
    Queue,
    QueuedTask,
    RunningTask,
    Snapshot,
    TaskStats,
    Window,
    Worker,
)

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from ..plumbing.base_task import BaseTask

Registry = Mapping[str, "type[BaseTask]"]


async def snapshot(redis: Redis) -> Snapshot:
    """Everything that can be counted, in two round trips."""
    raise NotImplementedError


async def queues(redis: Redis) -> list[Queue]:
    """The nine queues, most urgent first."""
    raise NotImplementedError


async def workers(redis: Redis) -> list[Worker]:
    """All workers that live or were heard of within the last minute, by size and name."""
    raise NotImplementedError


async def running(
    redis: Redis, limit: int = 100, after: str | None = None, *, registry: Registry | None = None
) -> Page[RunningTask]:
    """What runs, longest first. Each worker tells of at most 200 tasks.

    Args:
        registry: to name the arguments and to know which are secret.
    """
    raise NotImplementedError


async def delayed(
    redis: Redis,
    reason: DelayReason | None = None,
    limit: int = 100,
    after: str | None = None,
    *,
    registry: Registry | None = None,
) -> Page[DelayedTask]:
    """What is put aside, in the order in which it is due."""
    raise NotImplementedError


async def peek(
    redis: Redis, queue: str, limit: int = 100, after: str | None = None, *, registry: Registry | None = None
) -> Page[QueuedTask]:
    """The backlog of a queue (`{priority}:{size}`) in the order in which workers will take it.

    Raises:
        ValueError: when there is no such queue.
    """
    raise NotImplementedError


async def locks(redis: Redis, limit: int = 100, after: str | None = None) -> Page[Lock]:
    """Locks that tasks hold or wait for, and limiters that were used within the last day, by key."""
    raise NotImplementedError


async def lock(redis: Redis, key: str) -> Lock | None:
    """One lock by its Redis key, whoever holds it; None when nobody holds it or waits for it.

    Raises:
        ValueError: when the key is not that of a lock.
    """
    raise NotImplementedError


async def groups(redis: Redis, limit: int = 100) -> list[GroupStatus]:
    """Callback groups that have not called back, those that expire first first. One: `broker.groups.read_group`."""
    raise NotImplementedError


async def stats(redis: Redis, window: Window = "hour") -> list[TaskStats]:
    """How each class of tasks did over the last hour (by the minute) or day (by the hour), by name."""
    raise NotImplementedError


async def failures(
    redis: Redis, limit: int = 100, after: str | None = None, *, task_name: str | None = None
) -> Page[Failure]:
    """Failed attempts, newest first. The last 500 or so are kept, for a week."""
    raise NotImplementedError


async def history(redis: Redis) -> list[Point]:
    """The past hour, minute by minute, oldest first: for charts."""
    raise NotImplementedError
