"""Runs one task, from its arguments to its outcome. Its locks are taken before, and released after."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
import time
from asyncio import _get_running_loop
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from .._util.passwords import mask
from ..base_task import current_locks, current_message
from ..broker.telemetry import TRACER, is_traced, queue_attributes, task_attributes
from ..custom_locks import acquire_custom
from ..exceptions import LockLostError, TaskCancelledError, TimeLimitExceededError, WorkerStoppedError
from ..injection.plan import resolve
from ..locks import is_custom, lock_specs
from ..messages.arguments import execute_arguments, secret_names
from ..messages.error_info import ErrorInfo, describe_exception
from ..messages.secrets import without_secrets

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from ..base_task import BaseTask
    from ..broker.models import Delivery, Settlement, TaskMessage
    from ..broker.requests import LockSpec
    from ..locks import BaseLock
    from .task_spec import TaskSpec

logger = logging.getLogger(__name__)


class Succeeded(NamedTuple):  # made for every task
    """`execute` returned and its transaction was committed."""

    value: Any
    seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """`execute`, a dependency or the commit raised; or the worker cancelled the execution."""

    error: BaseException
    error_info: ErrorInfo
    """The error as text, without the task's secrets."""
    seconds: float
    started: datetime
    interrupted: bool = False
    """True if the lease, a lock or the worker was lost: no failure of the task itself."""


@dataclass(frozen=True, slots=True)
class LeaseLost:
    """The lease expired and another worker has the task now, which settles it."""


@dataclass(frozen=True, slots=True)
class LockRefused:
    """A custom lock was not granted, so `execute` was not called."""

    reason: str


Outcome = Succeeded | Failed | LeaseLost | LockRefused


class Execution:
    """One execution of a task that has its lease and its locks."""

    def __init__(
        self,
        delivery: Delivery,
        message: TaskMessage,
        spec: TaskSpec,
        task: BaseTask,
        locks: Sequence[BaseLock],
    ) -> None:
        self.delivery = delivery
        self.message = message
        self.spec = spec
        self.task = task
        self.locks: Sequence[LockSpec] = lock_specs(locks) if locks else ()
        self._held = locks
        self.locks_expire_at = math.inf
        """Time (`time.monotonic`) from which another worker may hold them; set by the keeper with each renewal."""
        self.running: asyncio.Task[None] | None = None  # the asyncio task that runs it
        self._cancelled_for: Exception | None = None
        self._interrupted = False
        self._lease_lost = False
        self._started: float | None = None
        self._limit: float | None = None
        self._cancelled_at: float | None = None

    def grant(self, token: int) -> None:
        """Set the fencing token of its locks, which are granted now."""
        # Copies, for a class may share its lock objects between tasks.
        self._held = [copy(lock) for lock in self._held]
        for lock in self._held:
            lock.token = token

    @property
    def started(self) -> float | None:
        """Start time (`time.monotonic`); None before it starts."""
        return self._started

    def on_lease_lost(self, reason: str, taken_over: bool) -> None:
        """Cancel the execution because it lost a lock, or its lease (`taken_over`)."""
        if self.running is not None and self.running.done():
            return  # it is being settled
        attributes = task_attributes(self.message)
        logger.warning("%s %s is cancelled: %s", *attributes.values(), reason, extra=attributes)
        self._lease_lost = taken_over
        self._interrupt(LockLostError(reason))

    def mark_cancelled(self) -> None:
        """Note the time of the cancellation; from any thread, for the event loop may be blocked."""
        if self._cancelled_at is None:
            self._cancelled_at = time.monotonic()

    def should_have_ended_at(self) -> float | None:
        """Time (`time.monotonic`) of its cancellation or its time limit, when that is past; else None."""
        moments = [] if self._cancelled_at is None else [self._cancelled_at]
        if self._started is not None and self._limit is not None:
            moments.append(self._started + self._limit)
        return min((moment for moment in moments if moment <= time.monotonic()), default=None)

    def abandoned_outcome(self) -> Failed | None:
        """Outcome when the process ends before the execution; None when this worker must not settle it."""
        if self._lease_lost or self._started is None:
            return None
        if self._cancelled_for is None:
            self.stop()
        assert self._cancelled_for is not None
        return self.failed(self._cancelled_for)

    def stop(self) -> None:
        """Cancel the execution because the grace period of the stopping worker is over."""
        self.cancel_again()
        if exceeded := self._deadline_exceeded():
            self._cancel(exceeded)
        else:
            self._interrupt(WorkerStoppedError("the worker stopped before the task had ended"))

    def cancel_again(self) -> None:
        """Repeat an earlier cancellation: `asyncio.wait_for` of Python 3.11 may have swallowed it."""
        if self._cancelled_for is not None and self.running is not None:
            self.running.cancel()

    def _deadline_exceeded(self) -> TimeLimitExceededError | None:
        """Error of an execution that goes on after its time limit; None before that."""
        if self._started is None or self._limit is None or time.monotonic() - self._started < self._limit:
            return None
        return TimeLimitExceededError(f"went on after its time limit of {self._limit} s")

    def cancel(self) -> None:
        """Cancel the execution on request."""
        if self.running is not None and self.running.done():
            return
        if self._cancelled_for is None:
            attributes = task_attributes(self.message)
            logger.warning("%s %s is cancelled on request", *attributes.values(), extra=attributes)
        self._cancel(TaskCancelledError("cancelled while it was running"))

    def _interrupt(self, reason: Exception) -> None:
        """Cancel the execution for a reason that is no failure of the task."""
        self._interrupted = self._interrupted or self._cancelled_for is None
        self._cancel(reason)

    def _cancel(self, reason: Exception) -> None:
        if self._cancelled_for is None:
            self._cancelled_for = reason
            self.mark_cancelled()
            # An asyncio task cancelled before its first step never runs, not even its `finally`. Until the start,
            # the reason above is enough: `run` reads it.
            if self.running is not None and self._started is not None:
                self.running.cancel()

    async def run(self, overrides: Mapping[Callable[..., Any], Callable[..., Any]], redis: Redis) -> Outcome:
        """Take custom locks, resolve, execute, commit. Never raises: every error becomes the outcome."""
        self._started = started = time.monotonic()
        current_message.set(self.message)
        if self._held:
            current_locks.set(self._held)
        deadline: asyncio.TimerHandle | None = None
        try:
            spec = self.spec
            limit = spec.time_limit(self.task) if spec.overridden else spec.task_class.time_limit_seconds
            if self._cancelled_for is not None:
                raise asyncio.CancelledError  # cancelled before the start
            if limit is not None:
                # Not `asyncio.timeout`, which relies on `Task.cancelling()`: code in the task may change that.
                deadline = asyncio.get_running_loop().call_later(limit, self._exceed)
                self._limit = limit
            kwargs = self.message.task_kwargs
            arguments = execute_arguments(type(self.task), kwargs) if kwargs else {}
            if self._held or spec.plan.parameters:
                value = await self._execute(overrides, redis, arguments)
            else:  # without the cost of a stack
                try:
                    value = await self.task.execute(**arguments)
                finally:
                    if _get_running_loop() is None:  # in a forked process
                        self._exit_forked()
                if self._cancelled_for is not None:
                    self._raise_if_cancelled()
        except BaseException as error:  # Rust's panics and KeyboardInterrupt are no Exception
            return self._ended_by(error)
        finally:
            if deadline is not None:
                deadline.cancel()
        return value if type(value) is LockRefused else Succeeded(value, time.monotonic() - started)

    def _ended_by(self, error: BaseException) -> Failed | LeaseLost:
        """Outcome of an execution that raised this error; the reason of its cancellation comes first."""
        if self._lease_lost:
            return LeaseLost()
        if self._cancelled_for is None:
            return self.failed(error)
        if not issubclass(type(error), asyncio.CancelledError) and error is not self._cancelled_for:
            self._cancelled_for.__cause__ = error
        return self.failed(self._cancelled_for)

    def _exceed(self) -> None:
        self._cancel(TimeLimitExceededError(f"took longer than its time limit of {self._limit} s"))

    async def _execute(
        self,
        overrides: Mapping[Callable[..., Any], Callable[..., Any]],
        redis: Redis,
        arguments: Mapping[str, Any],
    ) -> Any | LockRefused:
        async with AsyncExitStack() as stack:
            if custom := [lock for lock in self._held if is_custom(type(lock))]:
                lost = partial(self.on_lease_lost, taken_over=False)
                if refused := await acquire_custom(stack, custom, redis, lost):
                    return LockRefused(refused)
            dependencies = await resolve(self.spec.plan, overrides, stack)
            try:
                value = await self.task.execute(**{**dependencies, **arguments})
            finally:
                if _get_running_loop() is None:  # in a forked process
                    self._exit_forked()
            self._raise_if_cancelled()
            return value

    def _exit_forked(self) -> None:
        """End this process, which `execute` has forked: it has copies of the worker's connections."""
        error = sys.exception()
        code = 0 if error is None else error.code if isinstance(error, SystemExit) else 1
        if code == 1:
            logger.error("a process forked by %s ends", self.message.task_name, exc_info=error)
        os._exit(code if isinstance(code, int) else code is not None)

    def _raise_if_cancelled(self) -> None:
        """Raise the reason of a cancellation that the task swallowed: it must not commit without its lock or after
        its time limit.

        `Task.cancelling()` is not used: it stays above 0 when a task handles the failure of a TaskGroup (Python
        3.11 and 3.12).
        """
        # It may be past if the process was paused, or the event loop blocked.
        if self.locks and time.monotonic() >= self.locks_expire_at:
            self._interrupt(LockLostError("its locks could not be renewed in time, and may be another's"))
        if self._cancelled_for is not None:
            raise self._cancelled_for

    @property
    def hide(self) -> Callable[[str], str] | None:
        """Function that removes the task's secrets from a text; None for a task without secrets."""
        return partial(without_secrets, task=self.task) if secret_names(self.spec.task_class) else None

    def failed(self, error: BaseException) -> Failed:
        """Outcome of an execution that ended with this error."""
        seconds = 0.0 if self._started is None else time.monotonic() - self._started
        error_info = describe_exception(error, hide=self.hide)
        interrupted = self._interrupted and error is self._cancelled_for
        return Failed(error, error_info, seconds, datetime.now(UTC) - timedelta(seconds=seconds), interrupted)


# --- spans of OpenTelemetry; their names are those of the published package ---------------------------------


def _attempt_attributes(message: TaskMessage, stream: str) -> dict[str, str | int]:
    return {**task_attributes(message), **queue_attributes(stream), "task.retry_count": len(message.attempts)}


@contextmanager
def processing_span(message: TaskMessage, delivery: Delivery) -> Iterator[None]:
    """Open the span of a delivery: a trace of its own, linked to the submission or the attempt before.

    The next attempt, or the resubmission of the dead letter, is linked to it.
    """
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
    """Open the span of an execution, inside that of its delivery. Yields a function that records the outcome."""
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
            # An interruption or a cancellation is no error of the task.
            if (
                not isinstance(outcome, Failed)
                or outcome.interrupted
                or issubclass(type(outcome.error), TaskCancelledError)
            ):
                span.set_attribute("task.status", "cancelled")
                return
            kind, text = outcome.error_info["type"], mask(outcome.error_info["message"])
            span.set_attributes({"task.status": "error", "error.type": kind})
            span.set_status(trace.StatusCode.ERROR, f"{kind}: {text}")
            fields = {"type": kind, "message": text, "stacktrace": mask(outcome.error_info["traceback"])}
            span.add_event("exception", {f"exception.{name}": text for name, text in fields.items()})

        yield ended


def note_settlement(message: TaskMessage, settlement: Settlement) -> None:
    """Add to the span of a failed delivery: its retry, or the end of the task."""
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
        span.add_event("task.given_up", {"task.action": "discarded" if settlement.dead is None else "dlq"})
