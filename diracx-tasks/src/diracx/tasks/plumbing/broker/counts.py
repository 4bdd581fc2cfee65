"""Counters of one broker since it was made: a few additions, for metrics."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

from .._util.telemetry import METER, TASKS_SUBMITTED

if TYPE_CHECKING:
    from .models import Delivery, Submission


class Counts:
    """Counters that only grow."""

    __slots__ = ("occurrences", "promoted", "reclaimed", "submitted", "unparsable")

    def __init__(self) -> None:
        self.submitted: dict[tuple[str, str, bool], int] = {}
        """By name of the task, stream of its queue, and whether it has to wait for a moment."""
        self.promoted = 0
        """Delayed tasks and children of groups that were moved into their queues."""
        self.unparsable = 0
        """Delayed tasks that could not be read, and are dead letters now."""
        self.reclaimed: dict[str, int] = {}
        """Deliveries taken over from dead workers, by stream."""
        self.occurrences: dict[tuple[str, bool], int] = {}
        """Runs of schedules, by name of the task, and whether they were submitted."""

    def note_submitted(self, submissions: Iterable[Submission]) -> None:
        """Count messages that were sent, and that the server has."""
        for submission in submissions:
            self.note_one(submission.message.task_name, submission.stream, submission.at_time is not None)

    def note_one(self, name: str, stream: str, delayed: bool = False) -> None:
        """One was sent."""
        which = (name, stream, delayed)
        self.submitted[which] = self.submitted.get(which, 0) + 1
        count_submission(name, stream, delayed)

    def note_reclaimed(self, deliveries: Iterable[Delivery]) -> None:
        """Count deliveries that were taken over."""
        for delivery in deliveries:
            self.reclaimed[delivery.stream] = self.reclaimed.get(delivery.stream, 0) + 1

    def await_occurrences(self, names: Iterable[str]) -> None:
        """Runs of these will come: none is counted from now on, for an increase is only seen from something."""
        for name in names:
            for submitted in (True, False):
                self.occurrences.setdefault((name, submitted), 0)

    def note_occurrence(self, name: str, submitted: bool) -> None:
        """A run of a schedule was submitted, or could not be."""
        which = (name, submitted)
        self.occurrences[which] = self.occurrences.get(which, 0) + 1


def is_collected() -> bool:
    """True if OpenTelemetry's SDK is set up in this process, so that metrics are collected."""
    sdk = sys.modules.get("opentelemetry.sdk.metrics")
    if sdk is None:
        return False
    from opentelemetry import metrics  # others load the SDK, too, without setting it up

    return isinstance(metrics.get_meter_provider(), sdk.MeterProvider)


def count_submission(name: str, stream: str, delayed: bool) -> None:
    """Count a submitted task. Counted here, and not from the reports of processes, for a submitter may be
    any program. Without OpenTelemetry's SDK nobody collects it, and nothing is done.
    """
    if is_collected():
        priority, size = (*stream.split(":")[2:4], "", "")[:2]
        attributes = {"task_name": name, "priority": priority, "size": size, "delayed": delayed}
        _submissions().add(1, attributes)


@cache
def _submissions() -> Any:
    from opentelemetry import metrics

    meter = metrics.get_meter(METER)
    return meter.create_counter(TASKS_SUBMITTED, description="Tasks that were submitted.")
