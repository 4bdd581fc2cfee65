"""Cancel tasks by id: queued, delayed, waiting for a lock, or running.

What has not begun is gone at once. What runs is cancelled by its worker within about a second: its execution
gets a `CancelledError` at its next `await`, its transaction is rolled back. Either way it is not retried and no
dead letter; its result, if it is kept, is a `TaskCancelledError`, and for its callback group it has failed.
"""

from __future__ import annotations

from collections.abc import Sequence

from .base_task import current_broker
from .broker.cancel import TaskPlace

__all__ = ["TaskPlace", "cancel_task", "cancel_tasks"]


async def cancel_task(task_id: str) -> TaskPlace:
    """Cancel one task. Returns where it was; `TaskPlace.UNKNOWN` when there is no such task (any more).

    Raises:
        RuntimeError: when no broker is bound here.
        redis.exceptions.RedisError: when the broker cannot be reached; it may be repeated.
    """
    return (await cancel_tasks([task_id]))[task_id]


async def cancel_tasks(task_ids: Sequence[str]) -> dict[str, TaskPlace]:
    """Cancel several tasks, looking for them together. As `cancel_task`."""
    return await current_broker().cancel(task_ids)
