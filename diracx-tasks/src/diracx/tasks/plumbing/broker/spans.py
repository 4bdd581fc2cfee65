"""Names of tasks in log records, and OpenTelemetry spans of submissions.

Names of spans, attributes and log fields are those of the published package: dashboards and searches go on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .models import Submission, TaskMessage

#: The tracer, as OpenTelemetry knows it.
TRACER = "diracx.tasks"


def is_traced() -> bool:
    """True if OpenTelemetry's SDK is loaded in this process. Without it, nothing is done here."""
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
                    **queue_attributes(submission.stream),
                    "task.delayed": at_time is not None,
                    **({} if at_time is None else {"task.run_at": at_time.isoformat()}),
                },
            )
            stack.enter_context(span)
            propagate.inject(message.trace_context)
        yield


def queue_attributes(stream: str) -> dict[str, str]:
    """Priority and size, taken from the name of a stream."""
    priority, size = (*stream.split(":")[2:4], "", "")[:2]
    return {"task.priority": priority, "task.size": size}
