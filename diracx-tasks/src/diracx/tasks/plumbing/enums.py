"""Priority and size of tasks, which determine their queue."""

from __future__ import annotations

from enum import StrEnum


class Priority(StrEnum):
    """Priority of a task. A worker drains a higher priority before it looks at a lower one."""

    REALTIME = "realtime"
    NORMAL = "normal"
    BACKGROUND = "background"


class Size(StrEnum):
    """Size of the worker that a task needs. A worker has one size and takes only tasks of that size."""

    SMALL = "small"
    MEDIUM = "medium"
    LARGE = "large"
