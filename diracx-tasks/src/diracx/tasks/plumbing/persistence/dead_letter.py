"""Dead letters: tasks that do not run again unless an operator submits them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4

from ..broker.streams import DEAD_LETTERS
from ..messages.codec import dumps, loads

if TYPE_CHECKING:
    from ..broker.models import TaskMessage


class DeadLetterReason(StrEnum):
    """Reason for which a task became a dead letter."""

    EXHAUSTED = "exhausted"
    """It failed permanently, and its class is `dlq_eligible`."""
    POISON = "poison"
    """Delivered too often: every worker that took it died with it."""
    INTERRUPTED = "interrupted"
    """It was cut off too often: its lease, a lock or its worker was lost each time."""
    UNKNOWN_TASK = "unknown task"
    """No task of its name is registered."""
    UNPARSABLE = "unparsable"
    """The stream entry is no task message."""
    ARGUMENTS = "arguments"
    """Its class does not take its arguments."""
    UNSETTLED = "unsettled"
    """It ended, but its settlement could not be encoded: a defect of ours."""


class DeadLetterStatus(StrEnum):
    """Decision of the operator about a dead letter."""

    PENDING = "PENDING"
    RESUBMITTING = "RESUBMITTING"
    """A re-submission has begun. If it broke off, repeating it finishes it."""
    RESUBMITTED = "RESUBMITTED"
    DISCARDED = "DISCARDED"


#: Not decided yet, or the decision is not carried out yet.
OPEN = (DeadLetterStatus.PENDING, DeadLetterStatus.RESUBMITTING)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """Task as it was submitted, with the reason for which it failed."""

    task_id: str
    task_name: str
    """Registry name; empty when the message could not be read."""
    vo: str | None = None
    """The VO it belongs to; None: to none, or it is not known."""
    reason: str
    """A `DeadLetterReason`."""
    detail: str
    """One line about the last error."""
    data: bytes
    """The message (or the raw stream entry, when it could not be read)."""
    attempts: list[dict[str, Any]] = field(default_factory=list)
    """Every failed attempt: type, message, traceback, host, started, ended."""
    delivery_id: str = field(default_factory=lambda: uuid4().hex)
    """The delivery that failed, as `{stream}/{entry}`. Storing it twice changes nothing; another delivery of the
    same task (it was re-submitted and failed again) makes its dead letter pending again."""

    @classmethod
    def of_entry(cls, entry: str, fields: Mapping[bytes, bytes]) -> Self:
        """Read an entry of the stream of pending dead letters; an unreadable task of lua/_queue.lua among them.

        Raises:
            Exception: when it is neither.
        """
        data = fields[b"data"]
        if b"task" not in fields:
            named = loads(data)
            return cls(delivery_id=named.pop("burial"), **named)
        return cls(
            task_id=fields[b"task"].decode(errors="replace"),
            task_name="",
            reason=DeadLetterReason.UNPARSABLE,
            detail="cannot be decoded",
            data=data,
            delivery_id=f"{DEAD_LETTERS}/{entry}",
        )

    def dumpb(self) -> bytes:
        """Encode it for the stream of pending dead letters; `of_entry` reads it."""
        return dumps({"burial" if name == "delivery_id" else name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def of_message(
        cls, message: TaskMessage, reason: str, detail: str, delivery_id: str, vo: str | None = None
    ) -> Self:
        """Make the dead letter of a readable message."""
        return cls(
            task_id=message.task_id,
            task_name=message.task_name,
            vo=vo,
            reason=reason,
            detail=detail,
            data=message.dumpb(),
            attempts=message.attempts,
            delivery_id=delivery_id,
        )
