"""Tables of the dead-letter database."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Enum, Index, LargeBinary
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from ..sql.types import UTF8, AnyLongText, AnyName, AnyText, UTCDateTime
from .dead_letter import DeadLetterStatus

# A BLOB of MySQL has at most 64 KiB.
_LONG_BINARY = LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")
LONGEST_NAME = 255


class TaskDBBase(DeclarativeBase):
    """Tables of the TaskDB."""


class DeadLetters(TaskDBBase):
    """Table of dead letters, one row per task."""

    __tablename__ = "DeadLetters"

    id: Mapped[int] = mapped_column("ID", primary_key=True, autoincrement=True)
    task_id: Mapped[str] = mapped_column("TaskID", AnyName(LONGEST_NAME), unique=True)
    task_name: Mapped[str] = mapped_column("TaskName", AnyName(LONGEST_NAME))
    vo: Mapped[str | None] = mapped_column("VO", AnyName(LONGEST_NAME))
    """The VO of the task; NULL: none."""
    reason: Mapped[str] = mapped_column("Reason", AnyText(32))
    detail: Mapped[str] = mapped_column("Detail", AnyLongText())
    message: Mapped[bytes] = mapped_column("Message", _LONG_BINARY)
    attempts: Mapped[str] = mapped_column("Attempts", AnyLongText())
    delivery_id: Mapped[str] = mapped_column("Burial", AnyName(LONGEST_NAME))
    history: Mapped[str] = mapped_column("History", AnyLongText())
    """Earlier failures of the same task, as JSON."""
    status: Mapped[DeadLetterStatus] = mapped_column(
        "Status", Enum(DeadLetterStatus, native_enum=False, length=16), default=DeadLetterStatus.PENDING
    )
    buried_at: Mapped[datetime] = mapped_column("BuriedAt", UTCDateTime)
    changed_at: Mapped[datetime] = mapped_column("ChangedAt", UTCDateTime)
    """Time of the last change of the status."""

    __table_args__ = (
        Index("ix_DeadLetters_Status_BuriedAt", "Status", "BuriedAt"),
        Index("ix_DeadLetters_TaskName", "TaskName"),
        UTF8,
    )
