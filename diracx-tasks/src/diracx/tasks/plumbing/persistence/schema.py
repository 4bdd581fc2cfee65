"""The tables that outlive Redis."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import DateTime, Dialect, Enum, Index, LargeBinary, String, Text, TypeDecorator
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

#: MySQL picks its column type from the length; its default BLOB and TEXT end at 64 KiB.
_LONG = 2**24 - 1


class UtcDateTime(TypeDecorator[datetime]):
    """A moment: stored as UTC, always aware in Python, whatever the database makes of time zones."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


class DeadLetterStatus(StrEnum):
    """What was decided about a dead letter."""

    PENDING = "PENDING"
    RESUBMITTED = "RESUBMITTED"
    DISCARDED = "DISCARDED"


class TaskDBBase(DeclarativeBase):
    """Tables of the TaskDB."""


class DeadLetters(TaskDBBase):
    """Tasks that will not run again by themselves, one row for each task."""

    __tablename__ = "DeadLetters"

    id: Mapped[int] = mapped_column("ID", primary_key=True, autoincrement=True)
    task_id: Mapped[str] = mapped_column("TaskID", String(255), unique=True)
    task_name: Mapped[str] = mapped_column("TaskName", String(255))
    reason: Mapped[str] = mapped_column("Reason", String(32))
    detail: Mapped[str] = mapped_column("Detail", Text(_LONG))
    message: Mapped[bytes] = mapped_column("Message", LargeBinary(_LONG))
    attempts: Mapped[str] = mapped_column("Attempts", Text(_LONG))
    status: Mapped[DeadLetterStatus] = mapped_column(
        "Status", Enum(DeadLetterStatus, native_enum=False, length=16), default=DeadLetterStatus.PENDING
    )
    buried_at: Mapped[datetime] = mapped_column("BuriedAt", UtcDateTime)

    __table_args__ = (
        Index("ix_DeadLetters_Status_BuriedAt", "Status", "BuriedAt"),
        Index("ix_DeadLetters_TaskName", "TaskName"),
    )
