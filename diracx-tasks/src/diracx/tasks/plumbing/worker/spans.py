"""OpenTelemetry spans of deliveries and executions. Names are those of the published package."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from .._util.passwords import mask
from ..broker.spans import TRACER, is_traced, queue_attributes, task_attributes
from ..exceptions import TaskCancelledError
from .outcome import Failed, Succeeded

if TYPE_CHECKING:
    from ..broker.models import Delivery, Settlement, TaskMessage
    from ..persistence import DeadLetter
    from .outcome import Outcome


def _attempt_attributes(message: TaskMessage, stream: str) -> dict[str, str | int]:
    return {**task_attributes(message), **queue_attributes(stream), "task.retry_count": len(message.attempts)}


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
