"""Masks secret arguments of tasks and passwords in URLs."""

from __future__ import annotations

from typing import Any

from ..plumbing._util.passwords import mask
from ..plumbing._util.secrets import MASK
from ..plumbing.base_task import BaseTask
from ..plumbing.broker.labels import LABEL_SECRET
from ..plumbing.broker.models import TaskMessage
from ..plumbing.messages.arguments import field_names, is_made_for, secret_names, secret_positions
from .models import as_json

#: Labels of the task system, which are not shown as labels.
_OWN_LABELS = frozenset({"attempts", LABEL_SECRET})


def masked_arguments(task_class: type[BaseTask] | None, message: TaskMessage) -> dict[str, Any]:
    """Return the arguments by name, secret ones as `•••`.

    The names are positions, from `0`, if the class is unknown or its fields have changed. Secret are the
    `secret_fields` of the class, and the arguments that the submitter has declared secret in the message.
    """
    positional, named = masked(task_class, message)
    known = task_class is not None and is_made_for(task_class, message.sig, len(message.task_args))
    names = field_names(task_class) if task_class is not None and known else ()
    shown = {
        names[position] if position < len(names) else str(position): value
        for position, value in enumerate(positional)
    }
    arguments: dict[str, Any] = as_json({**shown, **named})
    return arguments


def masked(task_class: type[BaseTask] | None, message: TaskMessage) -> tuple[list[Any], dict[str, Any]]:
    """Return positional and named arguments, secret ones as `•••`."""
    label = message.labels.get(LABEL_SECRET)
    positions = {each for each in label if type(each) is int} if isinstance(label, list | tuple) else set()
    names: frozenset[str] = frozenset()
    if task_class is not None:
        positions.update(secret_positions(task_class))
        names = secret_names(task_class)
    positional = [MASK if position in positions else value for position, value in enumerate(message.task_args)]
    # Named arguments (of `submit_task`) are all masked if the class is unknown and has secrets.
    all_named = task_class is None and bool(positions)
    return positional, {
        str(name): MASK if all_named or name in names else value for name, value in message.task_kwargs.items()
    }


def has_secrets(message: TaskMessage) -> bool:
    """True if the message declares arguments as secret, or has secrets among them."""
    return LABEL_SECRET in message.labels or _holds_secret([message.task_args, message.task_kwargs])


def _holds_secret(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_secret, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_secret, value))
    return hasattr(value, "get_secret_value")


def shown_labels(message: TaskMessage) -> dict[str, Any]:
    """Return the labels that the submitter has set."""
    return {name: value for name, value in message.labels.items() if name not in _OWN_LABELS}


def masked_json(value: Any) -> Any:
    """Mask passwords of URLs in JSON."""
    if isinstance(value, dict):
        return {name: masked_json(each) for name, each in value.items()}
    if isinstance(value, list):
        return [masked_json(each) for each in value]
    return mask(value) if isinstance(value, str) else value
