"""Thresholds of the health checks, set by environment variables."""

from __future__ import annotations

import os
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...plumbing.exceptions import TaskConfigError

PREFIX = "DIRACX_TASKS_HEALTH_"


class HealthThresholds(BaseModel):
    """Thresholds of the health checks; the variable of each is `DIRACX_TASKS_HEALTH_` and its name in capitals."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    memory_warning_share: float = Field(default=0.8, gt=0, le=1)
    """Share of `maxmemory` in use: warning."""
    memory_critical_share: float = Field(default=0.9, gt=0, le=1)
    """The same: critical."""
    late_seconds: float = Field(default=30.0, gt=0)
    """Schedules and delayed tasks that are overdue by more."""
    wait_seconds: float = Field(default=600.0, gt=0)
    """The first task of a queue waits for longer; not for background queues."""
    growing_backlog: int = Field(default=1_000, ge=1)
    """Tasks queued while more are submitted than executed."""
    silent_seconds: float = Field(default=90.0, gt=0)
    """A live worker has not reported for longer; workers report every 5 s, idle ones every 50 s."""
    overdue_task_seconds: float = Field(default=10.0, gt=0)
    """A task continues for longer after its time limit or its cancellation."""
    deliveries: int = Field(default=3, ge=2)
    """Deliveries of a running task: workers have crashed with it."""
    failure_warning_share: float = Field(default=0.5, gt=0, le=1)
    """Share of failed attempts of a task class within the past hour: warning."""
    failure_critical_share: float = Field(default=0.9, gt=0, le=1)
    """The same: critical."""
    failure_attempts: int = Field(default=3, ge=1)
    """A class with fewer attempts within the past hour is not checked."""
    lock_held_seconds: float = Field(default=600.0, gt=0)
    """A task holds a lock for longer while others wait for it."""
    configuration_seconds: float = Field(default=60.0, gt=0)
    """Processes use different configurations for longer."""

    @classmethod
    def from_environment(cls) -> Self:
        """Read the thresholds from the environment.

        Raises:
            TaskConfigError: names the variable, its value and the problem.
        """
        given = {name: text for name in cls.model_fields if (text := os.environ.get(PREFIX + name.upper()))}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            raise TaskConfigError(f"{PREFIX}{name.upper()}={given[name]!r}: {first['msg']}") from error
