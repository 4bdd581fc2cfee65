"""The VO of a task: its argument `vo`, else its label `vo`, else none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .broker.labels import LABEL_VO
from .messages.arguments import field_names, is_made_for, own_serialize

if TYPE_CHECKING:
    from .base_task import BaseTask
    from .broker.models import TaskMessage


def vo_of(task_class: type[BaseTask] | None, message: TaskMessage) -> str | None:
    """Return the VO of a message without making the task, if known.

    Args:
        task_class: None if it is not installed: only the label is read.
    """
    return _text(None if task_class is None else _argument(task_class, message)) or _text(
        message.labels.get(LABEL_VO)
    )


def vo_of_task(task: BaseTask, message: TaskMessage) -> str | None:
    """Return the VO of a task made from a message."""
    return _text(own_vo(task)) or _text(message.labels.get(LABEL_VO))


def own_vo(task: BaseTask) -> str | None:
    """Return the attribute `vo` of a task. Never raises."""
    try:
        vo = getattr(task, "vo", None)
        return str.__str__(vo) if isinstance(vo, str) else None
    except BaseException:  # raised by a property
        return None


def _argument(task_class: type[BaseTask], message: TaskMessage) -> Any:
    if "vo" in message.task_kwargs:
        return message.task_kwargs["vo"]
    try:
        names = field_names(task_class)
    except Exception:  # the arguments of the class are unknown
        return None
    if "vo" not in names:
        return getattr(task_class, "vo", None)  # all tasks of the class are of one VO
    # Positions are unknown if the class overrides `serialize`, or has other fields now.
    unknown = own_serialize(task_class) or not is_made_for(task_class, message.sig, len(message.task_args))
    given = () if unknown else message.task_args
    position = names.index("vo")
    return given[position] if position < len(given) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
