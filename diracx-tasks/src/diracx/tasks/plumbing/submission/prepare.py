"""From a task to what is sent: its message, and the queue it goes to."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ..base_task import BaseTask
from ..broker.labels import LABEL_PRIORITY, LABEL_SECRET, LABEL_SIZE, checked_labels, stream_of_labels
from ..broker.models import Submission, TaskMessage, new_task_id
from ..locks import lock_specs
from ..messages.arguments import secret_positions, signature_of
from ..messages.roundtrip import outgoing_arguments

if TYPE_CHECKING:
    from ..config import TasksConfig
    from ..registry import TaskRegistry


def submission_of(
    task: BaseTask,
    registry: TaskRegistry,
    config: TasksConfig | None = None,
    *,
    at_time: datetime | None = None,
    labels: Mapping[str, Any] | None = None,
    task_id: str | None = None,
) -> Submission:
    """The task as a message for its queue: see `stream_of`.

    Raises:
        SendTaskError: when the class is not registered.
        TypeError: when an argument would not arrive as it is.
        ValueError: when its locks could never be granted, or are too many.
    """
    task_class = type(task)
    if task_class.execution_locks is not BaseTask.execution_locks:  # those every task has need no look
        try:
            lock_specs(task.execution_locks)
        except ValueError as error:
            raise ValueError(f"the locks of {task_class.__name__} could never be granted: {error}") from error
    name = registry.name_of(task_class)
    checked = checked_labels(labels) if labels else {}
    shape = signature_of(task_class)
    if shape.secret:
        checked[LABEL_SECRET] = secret_positions(task_class)
    args = outgoing_arguments(task, shape)
    message = TaskMessage(
        task_id=task_id or new_task_id(),
        task_name=name,
        labels=checked,
        task_args=args,
        sig=shape.signature(len(args)),
    )
    return Submission(message, stream_of(name, task, config, checked), at_time)


def stream_of(name: str, task: BaseTask, config: TasksConfig | None, labels: Mapping[str, Any]) -> str:
    """The queue of a task: by the operator's priority, else by its class, else by its labels.

    Raises:
        ValueError: when a label that counts names no queue.
    """
    task_class = type(task)
    priority = None if LABEL_PRIORITY in labels and not _declares(task_class, "priority") else task_class.priority
    size = None if LABEL_SIZE in labels and not _declares(task_class, "size") else task_class.size
    if config is not None and (config.common or config.vo_overrides):
        vo = getattr(task, "vo", None)
        priority = config.get_override(name, vo if isinstance(vo, str) else None).priority or priority
    return stream_of_labels(labels, priority, size)


def _declares(task_class: type[BaseTask], name: str) -> bool:
    """Whether the class or a base of it sets this, and not `BaseTask` alone."""
    return any(name in vars(each) for each in task_class.__mro__ if each is not BaseTask)
