"""Task names in logs, and OpenTelemetry spans of submissions, deliveries and executions.

Names of spans, attributes and log fields are those of the published package: dashboards and searches go on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ..messages.secrets import mask

if TYPE_CHECKING:
    from ..persistence import DeadLetter
    from ..worker.outcome import Outcome
    from .models import Delivery, Settlement, Submission, TaskMessage

#: The tracer, as OpenTelemetry knows it.
TRACER = "diracx.tasks"


def is_traced() -> bool:
    """Whether OpenTelemetry's SDK is loaded in this process. Without it, nothing is done here."""
    return "opentelemetry.sdk.trace" in sys.modules


def task_attributes(message: TaskMessage) -> dict[str, str]:
    """Name and id of a task, as the records of logs and the spans have them."""
    return {"task.name": message.task_name, "task.id": message.task_id}


def set_task_log_context(message: TaskMessage) -> None:
    """Add name and id of the task to every record that is logged in the rest of this context.

    A process that never imported the logging of DiracX has nothing that would look at them.
    """
    if (logs := sys.modules.get("diracx.core.logs")) is not None:
        logs.set_log_context(**task_attributes(message))


@contextmanager
def submission_spans(submissions: Iterable[Submission]) -> Iterator[None]:
    """A span of kind producer for each, until the end of the block. Its trace context goes with the message."""
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
                    **_queue_attributes(submission.stream),
                    "task.delayed": at_time is not None,
                    **({} if at_time is None else {"task.run_at": at_time.isoformat()}),
                },
            )
            stack.enter_context(span)
            propagate.inject(message.trace_context)
        yield


def _queue_attributes(stream: str) -> dict[str, str]:
    priority, size = (*stream.split(":")[2:4], "", "")[:2]
    return {"task.priority": priority, "task.size": size}


def _attempt_attributes(message: TaskMessage, stream: str) -> dict[str, str | int]:
    return {**task_attributes(message), **_queue_attributes(stream), "task.retry_count": len(message.attempts)}


@contextmanager
def processing_span(message: TaskMessage, delivery: Delivery) -> Iterator[None]:
    """The span of a delivery: a trace of its own, linked to the submission or the attempt before.

    The next attempt, or what a dead letter is submitted as, is linked to it.
    """
    if not is_traced():
        yield
        return
    from opentelemetry import context, propagate, trace

    producer = trace.get_current_span(propagate.extract(message.trace_context)).get_span_context()
    attributes: dict[str, str | int | float | bool] = {
        **_attempt_attributes(message, delivery.stream),
        "task.reclaimed": delivery.redelivered,
        "messaging.destination.name": delivery.stream,
        "messaging.message.id": delivery.entry,
    }
    if not delivery.redelivered:
        attributes["task.queue_wait_s"] = max(0.0, time.time() - delivery.queued_at)
    with trace.get_tracer(TRACER).start_as_current_span(
        f"task.process {message.task_name}",
        context=context.Context(),
        links=[trace.Link(producer)] if producer.is_valid else [],
        kind=trace.SpanKind.CONSUMER,
        attributes=attributes,
    ):
        propagate.inject(message.trace_context)
        yield


@contextmanager
def execution_span(message: TaskMessage, stream: str) -> Iterator[Callable[[Outcome], None]]:
    """The span of an execution, inside that of its delivery. Yields what notes how it ended."""
    from opentelemetry import trace

    from ..exceptions import TaskCancelledError
    from ..worker.outcome import Failed, Succeeded

    with trace.get_tracer(TRACER).start_as_current_span(
        f"task.execute {message.task_name}", attributes=_attempt_attributes(message, stream)
    ) as span:

        def ended(outcome: Outcome) -> None:
            if isinstance(outcome, Succeeded | Failed):
                span.set_attribute("task.duration_ms", outcome.seconds * 1000)
            if isinstance(outcome, Succeeded):
                span.set_attribute("task.status", "ok")
                return
            # What was interrupted or cancelled is no error of the task.
            if (
                not isinstance(outcome, Failed)
                or outcome.interrupted
                or issubclass(type(outcome.error), TaskCancelledError)
            ):
                span.set_attribute("task.status", "cancelled")
                return
            kind, said = outcome.told["type"], mask(outcome.told["message"])
            span.set_attributes({"task.status": "error", "error.type": kind})
            span.set_status(trace.StatusCode.ERROR, f"{kind}: {said}")
            shown = {"type": kind, "message": said, "stacktrace": mask(outcome.told["traceback"])}
            span.add_event("exception", {f"exception.{name}": text for name, text in shown.items()})

        yield ended


def note_settlement(message: TaskMessage, settlement: Settlement, letter: DeadLetter | None) -> None:
    """Tell in the span of a failed delivery what follows."""
    if not is_traced():
        return
    from opentelemetry import trace

    span = trace.get_current_span()
    if settlement.retry is not None:
        at = datetime.fromtimestamp(time.time() + settlement.retry["delay_ms"] / 1000, UTC)
        span.add_event(
            "task.retry_scheduled",
            {
                "task.retry.reason": "error",
                "task.retry.attempt": len(message.attempts) + 1,
                "task.retry.at": at.isoformat(),
                "task.retry.task_id": message.task_id,
            },
        )
    elif settlement.requeue is None:
        span.add_event("task.given_up", {"task.action": "discarded" if letter is None else "dlq"})
