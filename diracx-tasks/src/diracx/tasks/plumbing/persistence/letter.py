"""A dead letter: a task that nobody will run again unless somebody decides so."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from ..broker.models import TaskMessage


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """The task as it was submitted, and why it ended here."""

    task_id: str
    task_name: str
    """Registry name; empty when the message could not be read."""
    reason: str
    """`exhausted`, `poison`, `unknown task`, `unparsable`, `arguments` or `unsettled`."""
    detail: str
    """One line about the last error."""
    data: bytes
    """The message (or the raw stream entry, when it could not be read)."""
    attempts: list[dict[str, Any]] = field(default_factory=list)
    """Every failed attempt: type, message, traceback, host, started, ended."""

    @classmethod
    def of_message(cls, message: TaskMessage, reason: str, detail: str) -> Self:
        """The dead letter of a readable message."""
        return cls(
            task_id=message.task_id,
            task_name=message.task_name,
            reason=reason,
            detail=detail,
            data=message.dumpb(),
            attempts=message.attempts,
        )
