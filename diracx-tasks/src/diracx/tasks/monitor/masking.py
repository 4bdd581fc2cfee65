"""Arguments as anybody may see them: what a task declares to be secret is not shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..plumbing.base_task import BaseTask
    from ..plumbing.broker.models import TaskMessage


def masked_arguments(task_class: type[BaseTask] | None, message: TaskMessage) -> dict[str, Any]:
    """The arguments by name (by position, from `0`, where the class is not known), secret ones as `•••`.

    Secret is what the class names in `secret_fields`, or what the message says, which was submitted where the
    class was known.
    """
    raise NotImplementedError
