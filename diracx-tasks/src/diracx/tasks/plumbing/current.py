"""What is being executed here, and under which locks: set by the worker, for code inside `execute`."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .broker.models import TaskMessage
    from .locks import BaseLock

current_message: ContextVar[TaskMessage | None] = ContextVar("diracx_tasks_message", default=None)
current_locks: ContextVar[Sequence[BaseLock]] = ContextVar("diracx_tasks_locks", default=())


def held_locks() -> Sequence[BaseLock]:
    """The locks that this execution holds, in the order of `execution_locks`; limiters without a limit left out.

    Each has the fencing token of its grant: `lock.token`.
    """
    return current_locks.get()
