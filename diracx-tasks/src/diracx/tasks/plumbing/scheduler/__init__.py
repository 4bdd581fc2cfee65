"""What starts tasks: leadership, periodic and delayed ones."""

from __future__ import annotations

from .scheduler import TaskScheduler

__all__ = ["TaskScheduler"]
