"""The two words by which a task finds its queue: how urgent it is and how big a worker it needs."""

from __future__ import annotations

from enum import StrEnum


class Priority(StrEnum):
    """How urgent a task is. A worker drains a higher priority before it looks at a lower one."""

    REALTIME = "realtime"
    NORMAL = "normal"
    BACKGROUND = "background"


class Size(StrEnum):
    """How big a worker a task needs. A worker has one size and takes only tasks of that size."""

    SMALL = "small"
    MEDIUM = "medium"
    LARGE = "large"
