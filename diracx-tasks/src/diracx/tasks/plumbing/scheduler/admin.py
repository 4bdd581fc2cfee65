"""Actions of operators on schedules: run now, pause, resume. They work without a running scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..broker import scheduling
from ..broker.labels import LABEL_SCHEDULE
from ..broker.telemetry import submission_spans

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from ..submission.client import Binding
    from .occurrences import ScheduledTask


class AlreadyQueuedError(Exception):
    """The last occurrence of a schedule, task `task_id`, still waits for a worker: another was not submitted."""

    def __init__(self, task_id: str) -> None:
        super().__init__(f"the last occurrence, task {task_id}, still waits for a worker")
        self.task_id = task_id


async def run_now(binding: Binding, scheduled: ScheduledTask) -> str:
    """Submit a schedule's task at once, and return its id. The next run does not change.

    Raises:
        AlreadyQueuedError: the last occurrence has not started.
        TaskArgumentsError: when the class does not accept the arguments of the instance.
        redis.exceptions.RedisError: when the server refuses.
    """
    submission = binding.submission(scheduled.build(), labels={LABEL_SCHEDULE: scheduled.id})
    message = submission.message
    with submission_spans([submission]):
        waiting = await scheduling.run_now(
            binding.broker.redis, scheduled.id, submission.stream, message.task_id, submission.dumpb()
        )
    if waiting is not None:
        raise AlreadyQueuedError(waiting)
    return message.task_id


async def pause(redis: Redis, ids: Sequence[str]) -> list[str]:
    """Submit no more occurrences of these schedules. Returns those that were not paused before."""
    return await _set(redis, ids, True)


async def resume(redis: Redis, ids: Sequence[str]) -> list[str]:
    """Resume these schedules; occurrences due during the pause were missed. Returns those that had been paused."""
    return await _set(redis, ids, False)


async def _set(redis: Redis, ids: Sequence[str], paused: bool) -> list[str]:
    changes = await scheduling.pause(redis, ids, paused)
    return [id_ for id_, changed in zip(ids, changes, strict=True) if changed]
