"""Hide the values that a task declares to be secret."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .._util.secrets import hide
from .arguments import secret_names, signature_of


def without_secrets(text: str, task: Any) -> str:
    """Remove the values of the task's secret fields from a text."""
    names = secret_names(type(task))
    if not names:
        return text
    return hide(text, (getattr(task, name, getattr(task, f"_{name}", None)) for name in names))


def without_secrets_of(text: str, task_class: type[Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """As `without_secrets`, for a message of which no task can be made."""
    return hide(text, signature_of(task_class).secret_values(args, kwargs))
