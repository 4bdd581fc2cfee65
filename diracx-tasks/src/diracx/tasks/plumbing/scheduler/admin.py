"""Submits the task of a schedule now, also without a running scheduler."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..broker import scheduling
from ..broker.labels import LABEL_SCHEDULE
from ..broker.telemetry import submission_spans

if TYPE_CHECKING:
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
