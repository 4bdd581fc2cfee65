"""Dead letters in SQL: table, database class, and resubmission."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names
from .dead_letter import OPEN, DeadLetter, DeadLetterReason, DeadLetterStatus

if TYPE_CHECKING:
    from .db import TaskDB
else:  # without SQLAlchemy, which is slow to import
    __getattr__ = lazy_names(__name__, {".db": ["TaskDB"]})

__all__ = ["OPEN", "DeadLetter", "DeadLetterReason", "DeadLetterStatus", "TaskDB"]
