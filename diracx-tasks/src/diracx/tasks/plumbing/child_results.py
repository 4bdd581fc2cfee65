"""Results of the children of a group, injected into its callback."""

from __future__ import annotations

from typing import Any

from .base_task import BaseTask, current_broker, current_message
from .broker.groups import read_results
from .broker.labels import LABEL_CHILD_RESULTS
from .broker.models import TaskResult


async def child_results() -> dict[str, TaskResult[Any]]:
    """Return the results of the children of the group whose callback is executed.

    Raises:
        RuntimeError: the task is not the callback of a group.
        ResultIsMissingError: they have expired.
    """
    message = current_message.get()
    group = None if message is None else message.labels.get(LABEL_CHILD_RESULTS)
    if group is None:
        raise RuntimeError(
            "ChildResults are available only in the callback of a group: submit the task with spawn_with_callback"
        )
    return await read_results(current_broker().redis, group["group"], group["total"])


def needs_results(task_class: type[BaseTask]) -> bool:
    """Return whether `execute` (or a dependency of it) takes `ChildResults`."""
    from .injection.placeholders import calls_below
    from .injection.plan import compile_plan

    return child_results in calls_below(compile_plan(task_class.execute, skip_first=True), {})
