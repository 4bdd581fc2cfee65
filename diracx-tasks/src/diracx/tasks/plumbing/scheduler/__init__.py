"""What starts tasks: leadership, periodic and delayed ones; and what is known of schedules."""

from __future__ import annotations

from .overview import ScheduleState, schedules
from .scheduler import TaskScheduler

__all__ = ["ScheduleState", "TaskScheduler", "schedules"]
