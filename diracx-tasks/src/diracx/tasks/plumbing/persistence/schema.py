"""Tables of the dead-letter database."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import DateTime, Dialect, Enum, Index, LargeBinary, TypeDecorator
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from ..sql.types import UTF8, AnyLongText, AnyName, AnyText
from .dead_letter import DeadLetterStatus

# MySQL's BLOB ends at 64 KiB.
_LONG_BINARY = LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")
LONGEST_NAME = 255


class UtcDateTime(TypeDecorator[datetime]):
    """Timestamp column: stored as UTC, always aware in Python."""

    impl = DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        # MySQL's default rounds to the second, into the future as well.
        return mysql.DATETIME(fsp=6) if dialect.name in ("mysql", "mariadb") else DateTime()

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


class TaskDBBase(DeclarativeBase):
    """Tables of the TaskDB."""


class DeadLetters(TaskDBBase):
    """Table of dead letters, one row for each task."""

    __tablename__ = "DeadLetters"

    id: Mapped[int] = mapped_column("ID", primary_key=True, autoincrement=True)
    task_id: Mapped[str] = mapped_column("TaskID", AnyName(LONGEST_NAME), unique=True)
    task_name: Mapped[str] = mapped_column("TaskName", AnyName(LONGEST_NAME))
    vo: Mapped[str | None] = mapped_column("VO", AnyName(LONGEST_NAME))
    """The VO of the task; NULL: of none."""
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
    buried_at: Mapped[datetime] = mapped_column("BuriedAt", UtcDateTime)
    changed_at: Mapped[datetime] = mapped_column("ChangedAt", UtcDateTime)
    """Time when the status last changed."""

    __table_args__ = (
        Index("ix_DeadLetters_Status_BuriedAt", "Status", "BuriedAt"),
        Index("ix_DeadLetters_TaskName", "TaskName"),
        UTF8,
    )
