"""What is not for everybody's eyes: values that a task declares to be secret, and the passwords of URLs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base_task import BaseTask
    from .broker.models import TaskMessage

#: What stands where a value is not for everybody's eyes.
MASK = "•••"
#: `://user:password@`; over-cautious about what may belong to the password.
_IN_URL = re.compile(r"(?<=://)([^\s:@/'\"]*):[^\s'\"]*@")
_IN_QUERY = re.compile(r"([?&](?:sentinel_)?password=)[^&\s'\"]*", re.IGNORECASE)
#: Shorter parts of a secret that is no text itself, as the user of a pair, would be found anywhere.
_SHORTEST_PART = 4


def without_secrets(text: str, task: BaseTask) -> str:
    """The text without the values of the task's secret fields."""
    names = type(task).secret_fields
    if not names:
        return text
    return _without(text, (getattr(task, name, getattr(task, f"_{name}", None)) for name in names))


def without_secrets_of(text: str, task_class: type[BaseTask], message: TaskMessage) -> str:
    """The same, for a message of which no task can be made."""
    if not task_class.secret_fields:
        return text
    from .arguments import secret_positions

    positions = set(secret_positions(task_class))
    values = [value for position, value in enumerate(message.task_args) if position in positions]
    values += [value for name, value in message.task_kwargs.items() if name in task_class.secret_fields]
    return _without(text, values)


def _without(text: str, values: Iterable[Any]) -> str:
    forms = {form for value in values if value is not None for form in _forms(value)}
    for form in sorted(forms, key=len, reverse=True):  # a whole before its parts
        if len(form) > 1:  # a single letter is anywhere
            text = text.replace(form, MASK)
    return text


def _forms(value: Any) -> Iterator[str]:
    """How it may stand in a text."""
    if hasattr(value, "get_secret_value"):
        value = value.get_secret_value()
    yield str(value)
    yield repr(value)
    if isinstance(value, str):
        yield repr(value)[1:-1]
    elif isinstance(value, bytes):
        yield repr(value)[2:-1]
        yield value.decode(errors="replace")
    elif isinstance(value, Mapping):
        yield from _parts(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from _parts(value)


def _parts(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        yield from (form for form in _forms(value) if len(form) >= _SHORTEST_PART)


def mask(text: str) -> str:
    """The text with the passwords of all URLs in it replaced by `***`."""
    return _IN_QUERY.sub(r"\1***", _IN_URL.sub(r"\1:***@", text))
