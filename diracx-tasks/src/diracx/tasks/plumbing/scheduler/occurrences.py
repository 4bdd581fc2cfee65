"""Schedules: one for each periodic task, and for each VO and configured instance of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from ..base_task import BaseTask, PeriodicBaseTask, PeriodicVoAwareBaseTask
from ..broker.labels import LABEL_DUE, LABEL_SCHEDULE
from ..broker.models import in_ms
from ..broker.spans import submission_spans
from ..config import TasksConfig, owner, schedule_in_force
from ..messages.typed_arguments import check_arguments
from ..schedules import IntervalSeconds, TaskScheduleBase

if TYPE_CHECKING:
    from ..broker.requests import Occurrence
    from ..submission.client import Binding

#: An occurrence that is later than this was missed: nobody led, or it was paused. Longer than any fail-over.
MISSED_SECONDS = 30.0


@dataclass(frozen=True)
class ScheduledTask:
    """One instance of a periodic task and its rule."""

    id: str
    """`category:ClassName`, then `@instance` where the operator has named it, then `/vo` where it is VO-aware."""
    name: str
    """Registry name of the task."""
    task_class: type[PeriodicBaseTask]
    vo: str | None
    rule: TaskScheduleBase | None
    """Due time; None where neither code nor configuration says so."""
    instance: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the class, without the VO."""
    enabled: bool = True
    """True if it is to be scheduled."""
    source: str = "code"
    """Layer that determines the schedule: `code`, `common` or `vo NAME`."""
    missed: str = "once"
    """`once`: a missed occurrence is made up for; `skip`: it is left out."""

    def build(self) -> PeriodicBaseTask:
        """Make the task to submit.

        Raises:
            TaskArgumentsError: when its class does not accept its arguments.
        """
        if not self.args:
            return self.task_class() if self.vo is None else self.task_class(self.vo)  # type: ignore[call-arg]
        given = self.args if self.vo is None else {"vo": self.vo, **self.args}
        return check_arguments(self.task_class, [], given)

    @property
    def deterministic(self) -> bool:
        """True if the run after the next is known beforehand: a rule without `next_after` counts from now."""
        assert self.rule is not None
        return type(self.rule).next_after is not TaskScheduleBase.next_after

    def first_run_after(self, now: datetime) -> datetime | None:
        """Return the first run of a new rule; None when it has ended."""
        assert self.rule is not None
        try:
            return self.rule.next_after(now)
        except ValueError:
            return None

    def brought_back(self, due: datetime, now: datetime) -> datetime | None:
        """Return the next run in place of one that was planned by a clock ahead of the present one."""
        if not isinstance(self.rule, IntervalSeconds):
            return self.first_run_after(now)
        period = timedelta(seconds=self.rule.seconds)
        return due - (due - now) // period * period  # which keeps the phase

    def next_run_after(self, moment: datetime, now: datetime) -> datetime | None:
        """Return the first run after `moment` that is not missed already; None when the rule has ended."""
        assert self.rule is not None
        try:
            run = self.rule.next_after(moment)
            if run <= now:
                run = self._skip_missed(run, now)
        except ValueError:
            return None
        return run

    def _skip_missed(self, run: datetime, now: datetime) -> datetime:
        assert self.rule is not None
        if isinstance(self.rule, IntervalSeconds):  # keep the phase without counting through the gap
            missed = int((now - run).total_seconds() // self.rule.seconds) + 1
            return run + timedelta(seconds=missed * self.rule.seconds)
        return self.rule.next_after(now)

    def occurrence(self, binding: Binding, due_ms: int) -> Occurrence:
        """Make the arguments of lua/occur.lua for the run that is due then, except for the next one.

        Raises:
            Exception: whatever the task's class does wrong.
        """
        submission = binding.submission(self.build(), labels={LABEL_SCHEDULE: self.id, LABEL_DUE: due_ms})
        with submission_spans([submission]):
            return {
                "id": self.id,
                "due": due_ms,
                "stream": submission.stream,
                "task": submission.message.task_id,
                "data": submission.dumpb(),
            }

    def set_next(self, occurrence: Occurrence, now_ms: float) -> None:
        """Set `next`: when it is due after this occurrence, and after now; unset when that is the last run.

        Raises:
            RuntimeError: when the rule does not go forward.
        """
        occurrence.pop("next", None)
        due_ms = occurrence["due"]
        moment = datetime.fromtimestamp(due_ms / 1000, UTC)
        run = self.next_run_after(moment, datetime.fromtimestamp(now_ms / 1000, UTC))
        if run is None:
            return
        if (following := in_ms(run)) <= due_ms:
            raise RuntimeError(f"{self.rule!r}: after {moment.isoformat()} it gives {run.isoformat()}")
        occurrence["next"] = following


def iter_schedules(
    registry: Mapping[str, type[BaseTask]], config: TasksConfig, vos: Iterable[str]
) -> Iterator[ScheduledTask]:
    """Iterate over all instances of periodic tasks, disabled ones included."""
    known_vos = sorted(vos)
    for name, task_class in registry.items():
        if not issubclass(task_class, PeriodicBaseTask):
            continue
        for vo in known_vos if issubclass(task_class, PeriodicVoAwareBaseTask) else [None]:
            yield from _instances(name, task_class, vo, config)


def _instances(
    name: str, task_class: type[PeriodicBaseTask], vo: str | None, config: TasksConfig
) -> Iterator[ScheduledTask]:
    instances = config.get_override(name, vo).instances
    suffix = "" if vo is None else f"/{vo}"
    for instance in instances or [None]:
        enabled, rule, missed = schedule_in_force(config, name, task_class, vo, instance)
        yield ScheduledTask(
            name + ("" if instance is None else f"@{instance}") + suffix,
            name,
            task_class,
            vo,
            rule.value,
            instance=instance,
            args={} if instance is None else instances[instance].args,
            enabled=enabled.value and rule.value is not None,
            source=owner(rule.path if enabled.value else enabled.path),
            missed=missed.value,
        )


def scheduled_tasks(
    registry: Mapping[str, type[BaseTask]], config: TasksConfig, vos: Iterable[str]
) -> dict[str, ScheduledTask]:
    """Return all instances that should run, by id."""
    return {found.id: found for found in iter_schedules(registry, config, vos) if found.enabled}
