"""Actions of operators on schedules: run now, pause, resume. No scheduler has to run for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..broker import scheduling
from ..broker.labels import LABEL_SCHEDULE
from ..broker.spans import submission_spans

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from ..submission.client import Binding
    from .occurrences import ScheduledTask


@dataclass(frozen=True)
class RunNow:
    """Result of `run_now`."""

    task_id: str
    """Of the task that was submitted, or of the one that still waits."""
    submitted: bool


async def run_now(binding: Binding, scheduled: ScheduledTask) -> RunNow:
    """Submit a schedule's task at once, unless its last occurrence still waits. The next run stays as it is.

    Raises:
        TaskArgumentsError: when the class does not accept the arguments of the instance.
        redis.exceptions.RedisError: when the server refuses.
    """
    submission = binding.submission(scheduled.build(), labels={LABEL_SCHEDULE: scheduled.id})
    message = submission.message
    with submission_spans([submission]):
        waiting = await scheduling.run_now(
            binding.broker.redis, scheduled.id, submission.stream, message.task_id, submission.dumpb()
        )
    return RunNow(waiting or message.task_id, waiting is None)


async def pause(redis: Redis, ids: Sequence[str]) -> list[str]:
    """Submit no more occurrences of these schedules. Returns those that were not paused before."""
    return await _set(redis, ids, True)


async def resume(redis: Redis, ids: Sequence[str]) -> list[str]:
    """Resume these schedules; what came due meanwhile was missed. Returns those that had been paused."""
    return await _set(redis, ids, False)


async def _set(redis: Redis, ids: Sequence[str], paused: bool) -> list[str]:
    news = await scheduling.pause(redis, ids, paused)
    return [id_ for id_, changed in zip(ids, news, strict=True) if changed]
