"""Which schedules there are: one for each enabled periodic task, and for each VO where it is VO-aware."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from ..base_task import BaseTask, PeriodicBaseTask, PeriodicVoAwareBaseTask
from ..config import TasksConfig
from ..schedules import TaskScheduleBase


@dataclass(frozen=True)
class ScheduledTask:
    """One instance of a periodic task and its rule."""

    id: str
    """`category:ClassName`, and `/vo` where the task is VO-aware."""
    task_class: type[PeriodicBaseTask]
    vo: str | None
    rule: TaskScheduleBase

    def build(self) -> PeriodicBaseTask:
        """The task to submit."""
        return self.task_class() if self.vo is None else self.task_class(self.vo)  # type: ignore[call-arg]

    def next_run_after(self, moment: datetime, now: datetime) -> datetime | None:
        """The first run after `moment` that is not missed already; None when the rule has come to its end."""
        try:
            run = self.rule.next_after(moment)
            if run <= now:
                run = self._skip_missed(run, now)
        except ValueError:
            return None
        return run

    def _skip_missed(self, run: datetime, now: datetime) -> datetime:
        from ..schedules import IntervalSeconds

        if isinstance(self.rule, IntervalSeconds):  # keep the phase without counting through the gap
            missed = int((now - run).total_seconds() // self.rule.seconds) + 1
            return run + timedelta(seconds=missed * self.rule.seconds)
        return self.rule.next_after(now)


def scheduled_tasks(
    registry: Mapping[str, type[BaseTask]], config: TasksConfig, vos: Iterable[str]
) -> dict[str, ScheduledTask]:
    """All instances that should run, by id."""
    found = {}
    for name, task_class in registry.items():
        if not issubclass(task_class, PeriodicBaseTask):
            continue
        instances = sorted(vos) if issubclass(task_class, PeriodicVoAwareBaseTask) else [None]
        for vo in instances:
            override = config.get_override(name, vo)
            periodic = override.periodic
            if not (task_class._enabled and override.enabled and (periodic is None or periodic.enabled)):
                continue
            rule = (periodic.as_schedule() if periodic else None) or getattr(task_class, "default_schedule", None)
            if rule is None:
                continue
            instance = ScheduledTask(name if vo is None else f"{name}/{vo}", task_class, vo, rule)
            found[instance.id] = instance
    return found
