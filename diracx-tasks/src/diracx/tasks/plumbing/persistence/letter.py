"""A dead letter: a task that nobody will run again unless somebody decides so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4

from ..broker.streams import DEAD_LETTERS
from ..messages.codec import loads

if TYPE_CHECKING:
    from ..broker.models import TaskMessage


class DeadLetterReason(StrEnum):
    """Why a task ended as a dead letter."""

    EXHAUSTED = "exhausted"
    """It failed for good, and its class is `dlq_eligible`."""
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
    """It ended, but what follows from its end could not be put into words: a defect of ours."""


class DeadLetterStatus(StrEnum):
    """What was decided about a dead letter."""

    PENDING = "PENDING"
    RESUBMITTING = "RESUBMITTING"
    """Somebody has begun to submit it again. If that broke off, whoever repeats it finishes it."""
    RESUBMITTED = "RESUBMITTED"
    DISCARDED = "DISCARDED"


#: Nothing has been decided yet, or what was decided is not done yet.
OPEN = (DeadLetterStatus.PENDING, DeadLetterStatus.RESUBMITTING)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """The task as it was submitted, and why it ended here."""

    task_id: str
    task_name: str
    """Registry name; empty when the message could not be read."""
    vo: str | None = None
    """The VO it belongs to; None: to none, or that cannot be told."""
    reason: str
    """A `DeadLetterReason`."""
    detail: str
    """One line about the last error."""
    data: bytes
    """The message (or the raw stream entry, when it could not be read)."""
    attempts: list[dict[str, Any]] = field(default_factory=list)
    """Every failed attempt: type, message, traceback, host, started, ended."""
    burial: str = field(default_factory=lambda: uuid4().hex)
    """The delivery that ended here, as `{stream}/{entry}`. Storing one burial again changes nothing; another
    one of the same task (it was re-submitted and failed again) opens its letter anew."""

    @classmethod
    def of_entry(cls, entry: str, fields: Mapping[bytes, bytes]) -> Self:
        """A letter that waits in Redis, or what a script has found that nobody can read (lua/_queue.lua).

        Raises:
            Exception: when it is neither.
        """
        data = fields[b"data"]
        if b"task" not in fields:
            return cls(**loads(data))
        return cls(
            task_id=fields[b"task"].decode(errors="replace"),
            task_name="",
            reason=DeadLetterReason.UNPARSABLE,
            detail="cannot be decoded",
            data=data,
            burial=f"{DEAD_LETTERS}/{entry}",
        )

    @classmethod
    def of_message(
        cls, message: TaskMessage, reason: str, detail: str, burial: str, vo: str | None = None
    ) -> Self:
        """The dead letter of a readable message."""
        return cls(
            task_id=message.task_id,
            task_name=message.task_name,
            vo=vo,
            reason=reason,
            detail=detail,
            data=message.dumpb(),
            attempts=message.attempts,
            burial=burial,
        )
