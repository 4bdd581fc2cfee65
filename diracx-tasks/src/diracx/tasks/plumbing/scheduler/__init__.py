"""Scheduler: leader election, periodic and delayed tasks, and the read model of schedules."""

from __future__ import annotations

from .overview import ScheduleState, schedules
from .scheduler import TaskScheduler

__all__ = ["ScheduleState", "TaskScheduler", "schedules"]
