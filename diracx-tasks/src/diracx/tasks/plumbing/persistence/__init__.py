"""Dead letters in SQL: the table, its access, and submitting again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .dead_letter import OPEN, DeadLetter, DeadLetterReason, DeadLetterStatus

if TYPE_CHECKING:
    from .db import TaskDB

__all__ = ["OPEN", "DeadLetter", "DeadLetterReason", "DeadLetterStatus", "TaskDB"]


def __getattr__(name: str) -> Any:
    # SQLAlchemy is only worth its import time to those who have a database.
    if name == "TaskDB":
        from .db import TaskDB

        return TaskDB
    raise AttributeError(name)
