"""Which task is being executed here: set by the worker, for what is injected into it."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .broker.models import TaskMessage

current_message: ContextVar[TaskMessage | None] = ContextVar("diracx_tasks_message", default=None)
