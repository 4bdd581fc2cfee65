"""Schedules: one for each periodic task, and for each of its VOs and configured instances."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from ..base_task import BaseTask, PeriodicBaseTask, PeriodicVoAwareBaseTask
from ..broker.labels import LABEL_DUE, LABEL_SCHEDULE
from ..broker.models import in_ms
from ..broker.telemetry import submission_spans
from ..config import TasksConfig, owner, schedule_settings
from ..messages.typed_arguments import check_arguments
from ..schedules import IntervalSeconds, TaskScheduleBase
from .clock import SET_BACK_SECONDS

if TYPE_CHECKING:
    from ..broker.requests import Occurrence
    from ..submission.client import Binding

#: A later occurrence counts as missed: there was no leader, or it was paused. Longer than any failover.
MISSED_SECONDS = 30.0


@dataclass(frozen=True)
class ScheduledTask:
    """One instance of a periodic task and its rule."""

    id: str
    """`category:ClassName`, then `@instance` for a configured instance, then `/vo` for a VO-aware task."""
    name: str
    """Registry name of the task."""
    task_class: type[PeriodicBaseTask]
    vo: str | None
    rule: TaskScheduleBase | None
    """Rule of the due times; None if neither code nor configuration sets one."""
    instance: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the class, without the VO."""
    enabled: bool = True
    """True if it is to be scheduled."""
    source: str = "code"
    """Layer that determines the schedule: `code`, `common` or `vo NAME`."""
    missed: str = "once"
    """`once`: run once for all missed occurrences; `skip`: run none of them."""

    def build(self) -> PeriodicBaseTask:
        """Make the task to submit.

        Raises:
            TaskArgumentsError: when its class does not accept its arguments.
        """
        if not self.args:
            return self.task_class() if self.vo is None else self.task_class(self.vo)  # type: ignore[call-arg]
        arguments = self.args if self.vo is None else {"vo": self.vo, **self.args}
        return check_arguments(self.task_class, [], arguments)

    @property
    def deterministic(self) -> bool:
        """True if the run after the next is known in advance: a rule without `next_after` counts from now."""
        assert self.rule is not None
        return type(self.rule).next_after is not TaskScheduleBase.next_after

    def corrected_ms(self, due_ms: int | None, now: datetime, latest: dict[str, datetime]) -> int | None:
        """Return the next due time (ms) instead of one planned before the clock was set back; None: none needed.

        Args:
            latest: the latest next run that a rule may have now, by fingerprint. Many schedules share a rule.
        """
        assert self.rule is not None
        key = self.rule.fingerprint
        try:
            if key not in latest:
                # The planned run may follow a run that is due within the tolerance of the clock.
                latest[key] = self.rule.next_after(now + timedelta(seconds=SET_BACK_SECONDS))
            if due_ms is None:
                return in_ms(latest[key]) if self.deterministic else None
            if due_ms <= max(in_ms(latest[key]), in_ms(now)):
                return None
            return in_ms(self._first_in_phase(datetime.fromtimestamp(due_ms / 1000, UTC), now))
        except BaseException:
            return None  # the rule has ended, or fails: reported when the schedule is due

    def next_run_after(self, moment: datetime, now: datetime) -> datetime | None:
        """Return the first run after both `moment` and `now`; None when the rule has ended."""
        assert self.rule is not None
        try:
            run = self.rule.next_after(moment)
            if run <= now:
                run = self._first_in_phase(run, now)
        except ValueError:
            return None
        return run

    def _first_in_phase(self, run: datetime, now: datetime) -> datetime:
        """Return the first run after `now`; an interval keeps the phase of `run`, without counting runs."""
        assert self.rule is not None
        if not isinstance(self.rule, IntervalSeconds):
            return self.rule.next_after(now)
        period = timedelta(seconds=self.rule.seconds)
        return run + ((now - run) // period + 1) * period

    def occurrence(self, binding: Binding, due_ms: int) -> Occurrence:
        """Make the arguments of lua/occur.lua for the run with that due time, except `next`.

        Raises:
            Exception: any error of the task class.
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
        """Set `next`, the first due time after this occurrence and after now; unset it after the last run.

        Raises:
            RuntimeError: when the rule returns a time that is not after the occurrence.
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
        enabled, rule, missed = schedule_settings(config, name, task_class, vo, instance)
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
