"""Results of the children of a group, injected into its callback."""

from __future__ import annotations

from typing import Any

from .base_task import BaseTask, current_broker, current_message
from .broker.groups import read_results
from .broker.labels import LABEL_CHILD_RESULTS
from .broker.models import TaskResult

__all__ = ["asks_for_results", "child_results"]


async def child_results() -> dict[str, TaskResult[Any]]:
    """Return the results of the children of the group whose callback is executed.

    Raises:
        RuntimeError: when what is being executed is not the callback of a group.
        ResultIsMissingError: when they have expired.
    """
    message = current_message.get()
    asked = None if message is None else message.labels.get(LABEL_CHILD_RESULTS)
    if asked is None:
        raise RuntimeError(
            "ChildResults are there for the callback of a group only: submit the task with spawn_with_callback"
        )
    return await read_results(current_broker().redis, asked["group"], asked["total"])


def asks_for_results(task_class: type[BaseTask]) -> bool:
    """Return whether `execute` (or a dependency of it) takes `ChildResults`."""
    from .injection.placeholders import calls_below
    from .injection.plan import compile_plan

    return child_results in calls_below(compile_plan(task_class.execute, skip_first=True), {})
