"""Values that a task declares to be secret (`secret_fields`) are taken out of what is told of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base_task import BaseTask

#: What stands where a value is not for everybody's eyes.
MASK = "•••"


def without_secrets(text: str, task: BaseTask) -> str:
    """The text without the values of the task's secret fields."""
    for name in type(task).secret_fields:
        value = getattr(task, name, getattr(task, f"_{name}", None))
        secret = "" if value is None else str(value)
        if len(secret) > 1:  # a single letter is anywhere
            text = text.replace(secret, MASK)
    return text
