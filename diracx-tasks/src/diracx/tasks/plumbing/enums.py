"""Priority and size of tasks, which determine their queue."""

from __future__ import annotations

from enum import StrEnum


class Priority(StrEnum):
    """Priority of a task. Workers take tasks of the highest priority first."""

    REALTIME = "realtime"
    NORMAL = "normal"
    BACKGROUND = "background"


class Size(StrEnum):
    """Size of the workers that execute a task."""

    SMALL = "small"
    MEDIUM = "medium"
    LARGE = "large"
