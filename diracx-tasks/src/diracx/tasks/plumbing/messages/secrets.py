"""Removes the secret arguments of a task from texts."""

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
    """Remove the secret arguments of a message from a text, if its task cannot be made."""
    return hide(text, signature_of(task_class).secret_values(args, kwargs))
