"""Dead letters: failed tasks that run again only if an operator submits them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4

from ..broker.requests import RESUBMITTED_TTL_SECONDS
from ..broker.streams import DEAD_LETTERS
from ..messages.codec import dumps, loads

if TYPE_CHECKING:
    from ..broker.models import TaskMessage
    from ..broker.requests import StoredDeadLetter


class DeadLetterReason(StrEnum):
    """Reason for which a task became a dead letter."""

    EXHAUSTED = "exhausted"
    """It failed permanently, and its class is `dlq_eligible`."""
    POISON = "poison"
    """Delivered too often: every worker that executed it crashed."""
    INTERRUPTED = "interrupted"
    """Interrupted too often: its lease, a lock or its worker was lost each time."""
    UNKNOWN_TASK = "unknown task"
    """No task of its name is registered."""
    UNPARSABLE = "unparsable"
    """The stream entry is not a task message."""
    ARGUMENTS = "arguments"
    """Its class does not accept its arguments."""
    UNSETTLED = "unsettled"
    """It ended, but its settlement could not be encoded: a bug."""


class DeadLetterStatus(StrEnum):
    """Status of a dead letter."""

    PENDING = "PENDING"
    RESUBMITTING = "RESUBMITTING"
    """A re-submission has begun. If it was interrupted, repeating it completes it."""
    RESUBMITTED = "RESUBMITTED"
    DISCARDED = "DISCARDED"


#: Statuses of dead letters that an operator has to retry or discard.
OPEN = (DeadLetterStatus.PENDING, DeadLetterStatus.RESUBMITTING)
#: After this time, the broker's record of an interrupted re-submission may have expired.
FORGOTTEN_AFTER = timedelta(seconds=RESUBMITTED_TTL_SECONDS - 86400)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A failed task with its message, reason and attempts."""

    task_id: str
    task_name: str
    """Registry name; empty if the message cannot be decoded."""
    vo: str | None = None
    """VO of the task; None if it has none, or it is unknown."""
    reason: str
    """A `DeadLetterReason`."""
    detail: str
    """One line about the last error."""
    data: bytes
    """The message, or the raw stream entry if it cannot be decoded."""
    attempts: list[dict[str, Any]] = field(default_factory=list)
    """All failed attempts: type, message, traceback, host, started, ended."""
    delivery_id: str = field(default_factory=lambda: uuid4().hex)
    """The failed delivery, `{stream}/{entry}`. Storing it again has no effect; storing another delivery of the
    task (re-submitted and failed again) makes its dead letter pending again."""

    @classmethod
    def of_entry(cls, entry: str, fields: Mapping[bytes, bytes]) -> Self:
        """Decode an entry of the stream of pending dead letters, or of an undecodable task (lua/_queue.lua).

        Raises:
            Exception: it is neither.
        """
        data = fields[b"data"]
        if b"task" not in fields:
            return cls._of_data(data)
        return cls(
            task_id=fields[b"task"].decode(errors="replace"),
            task_name="",
            reason=DeadLetterReason.UNPARSABLE,
            detail="cannot be decoded",
            data=data,
            delivery_id=f"{DEAD_LETTERS}/{entry}",
        )

    @classmethod
    def of_stored(cls, stored: StoredDeadLetter) -> Self:
        """Inverse of `to_stored`."""
        return cls._of_data(stored["data"])

    @classmethod
    def _of_data(cls, data: bytes) -> Self:
        named = loads(data)
        return cls(delivery_id=named.pop("burial"), **named)

    def to_stored(self) -> StoredDeadLetter:
        """Fields of its entry in the stream of pending dead letters."""
        data = {"burial" if name == "delivery_id" else name: getattr(self, name) for name in self.__slots__}
        return {"reason": self.reason, "data": dumps(data)}

    @classmethod
    def of_message(
        cls, message: TaskMessage, reason: str, detail: str, delivery_id: str, vo: str | None = None
    ) -> Self:
        """Make the dead letter of a message."""
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
