"""Telemetry of messages: task names in log records, OpenTelemetry spans of submissions, counters of a broker, and
histograms of durations.

Names of spans, attributes and log fields are those of the published package, so that dashboards and searches work.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from .._util.telemetry import METER, TASKS_SUBMITTED

if TYPE_CHECKING:
    from .models import Delivery, Submission, TaskMessage

#: Name of the tracer.
TRACER = "diracx.tasks"

# Logarithmic histograms of durations: four buckets per doubling, so that errors are at most 19 %.
#: Number of buckets; the last one begins at five years.
BUCKETS = 150
_PER_DOUBLING = 4
_FIRST_SECONDS = 0.001


def is_traced() -> bool:
    """True if OpenTelemetry's SDK is loaded in this process. Without it, no spans are made."""
    return "opentelemetry.sdk.trace" in sys.modules


def task_attributes(message: TaskMessage) -> dict[str, str]:
    """Name and id of a task, as the attributes of log records and spans."""
    return {"task.name": message.task_name, "task.id": message.task_id}


@contextmanager
def submission_spans(submissions: Iterable[Submission]) -> Iterator[None]:
    """Open a producer span for each submission, until the end of the block; its trace context is put into the
    message.
    """
    if not is_traced():
        yield
        return
    from opentelemetry import context, propagate, trace

    tracer, parent = trace.get_tracer(TRACER), context.get_current()
    with ExitStack() as stack:
        for submission in submissions:
            message, at_time = submission.message, submission.at_time
            span = tracer.start_as_current_span(
                f"task.submit {message.task_name}",
                context=parent,
                kind=trace.SpanKind.PRODUCER,
                attributes={
                    **task_attributes(message),
                    **queue_attributes(submission.stream),
                    "task.delayed": at_time is not None,
                    **({} if at_time is None else {"task.run_at": at_time.isoformat()}),
                },
            )
            stack.enter_context(span)
            propagate.inject(message.trace_context)
        yield


def queue_attributes(stream: str) -> dict[str, str]:
    """Priority and size in the name of a stream."""
    priority, size = (*stream.split(":")[2:4], "", "")[:2]
    return {"task.priority": priority, "task.size": size}


class Counts:
    """Counters of one broker since its creation, for metrics."""

    __slots__ = ("occurrences", "promoted", "reclaimed", "submitted", "unparsable")

    def __init__(self) -> None:
        self.submitted: dict[tuple[str, str, bool], int] = {}
        """Submitted tasks, by name of the task, stream of its queue, and whether it is delayed."""
        self.promoted = 0
        """Delayed tasks and children of groups that were moved into their queues."""
        self.unparsable = 0
        """Unreadable delayed tasks, which are dead letters now."""
        self.reclaimed: dict[str, int] = {}
        """Deliveries reclaimed from dead workers, by stream."""
        self.occurrences: dict[tuple[str, bool], int] = {}
        """Occurrences of schedules, by name of the task, and whether they could be submitted."""

    def note_submitted(self, submissions: Iterable[Submission]) -> None:
        """Count messages that the server has accepted."""
        for submission in submissions:
            self.note_one(submission.message.task_name, submission.stream, submission.at_time is not None)

    def note_one(self, name: str, stream: str, delayed: bool = False) -> None:
        """Count one submitted task."""
        key = (name, stream, delayed)
        self.submitted[key] = self.submitted.get(key, 0) + 1
        count_submission(name, stream, delayed)

    def note_reclaimed(self, deliveries: Iterable[Delivery]) -> None:
        """Count reclaimed deliveries."""
        for delivery in deliveries:
            self.reclaimed[delivery.stream] = self.reclaimed.get(delivery.stream, 0) + 1

    def await_occurrences(self, names: Iterable[str]) -> None:
        """Start the counters of these tasks at 0, so that the first occurrence is seen as an increase."""
        for name in names:
            for submitted in (True, False):
                self.occurrences.setdefault((name, submitted), 0)

    def note_occurrence(self, name: str, submitted: bool) -> None:
        """Count an occurrence of a schedule."""
        key = (name, submitted)
        self.occurrences[key] = self.occurrences.get(key, 0) + 1


def is_collected() -> bool:
    """True if OpenTelemetry's SDK is set up in this process, so that metrics are collected."""
    sdk = sys.modules.get("opentelemetry.sdk.metrics")
    if sdk is None:
        return False
    from opentelemetry import metrics  # the SDK may be loaded without being set up

    return isinstance(metrics.get_meter_provider(), sdk.MeterProvider)


def count_submission(name: str, stream: str, delayed: bool) -> None:
    """Count a submitted task in OpenTelemetry, if its SDK is set up: a submitter may be any program, which
    publishes no reports.
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


def end_of_bucket(bucket: int) -> float:
    """Return the longest duration (s) of a bucket."""
    return float(_FIRST_SECONDS * 2 ** (bucket / _PER_DOUBLING))


#: Ends of the buckets but the last one: `bisect_left(BUCKET_ENDS, seconds)` is the bucket of a duration.
BUCKET_ENDS = [end_of_bucket(bucket) for bucket in range(BUCKETS - 1)]
