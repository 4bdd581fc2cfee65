"""Cancels tasks by id: queued, delayed, waiting for a lock, or running.

Waiting tasks are removed immediately. A running task is cancelled by its worker within about a second: `execute`
gets a `CancelledError` at its next `await`, and its transaction is rolled back. A cancelled task is not retried
and does not become a dead letter; its result, if stored, is a `TaskCancelledError`, and for its group it has
failed.
"""

from __future__ import annotations

from collections.abc import Sequence

from .base_task import current_broker
from .broker.cancel import TaskPlace

__all__ = ["TaskPlace", "cancel_task", "cancel_tasks"]


async def cancel_task(task_id: str) -> TaskPlace:
    """Cancel one task. Returns its state; `TaskPlace.UNKNOWN` if it has ended or does not exist.

    Raises:
        RuntimeError: no broker is bound.
        redis.exceptions.RedisError: the broker cannot be reached; the call can be repeated.
    """
    return (await cancel_tasks([task_id]))[task_id]


async def cancel_tasks(task_ids: Sequence[str]) -> dict[str, TaskPlace]:
    """Cancel several tasks with one search. Returns the state of each; errors as of `cancel_task`."""
    return await current_broker().cancel(task_ids)
