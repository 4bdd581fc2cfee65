"""Decides the settlement of each outcome: a result, a retry, a requeue or a dead letter."""

from __future__ import annotations

import logging
import random
import socket
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from ..broker.effects import completion_effects, retry_effects
from ..broker.labels import LABEL_ATTEMPTS, LABEL_RETRIES
from ..broker.models import Settlement, TaskMessage, TaskResult, id_at_head, in_ms
from ..broker.streams import queue_stream, resumed_stream
from ..broker.telemetry import task_attributes
from ..exceptions import (
    StopRetryingError,
    TaskCancelledError,
    TaskRejectedError,
    TaskRetryRequestedError,
    UnableToAcquireLockError,
    WorkerStoppedError,
)
from ..messages.error_info import ErrorInfo, cut, describe_exception, one_line
from ..persistence.dead_letter import DeadLetter, DeadLetterReason
from ..task_vo import vo_of, vo_of_task
from .execution import Failed, LeaseLost, LockRefused, Outcome

if TYPE_CHECKING:
    from ..base_task import BaseTask
    from ..broker.models import Delivery
    from ..broker.requests import DelayedRetry, LockSpec, Requeue
    from ..retry_policies import RetryPolicyBase
    from .execution import Execution
    from .settings import WorkerSettings

logger = logging.getLogger(__name__)

#: Longest delay of a requested retry when the policy gives none: 1 s, 2 s, 4 s … up to this.
_LONGEST_REQUESTED_DELAY_SECONDS = 3600
#: Delay after which a message for workers of a later version is delivered again. It varies, since blocking reads
#: of idle workers end at regular times: with a fixed one, the same worker could get the message again and again.
_NEWER_DELAYS_MS = (1_000, 9_000)
#: Characters of the traceback of a failed attempt that are kept in the message.
_LONGEST_ATTEMPT_TRACEBACK = 4_000
#: Characters of the error messages and tracebacks of all attempts of a task; beyond that, of an old error message.
_LONGEST_ATTEMPTS = 100_000
_LONGEST_OLD_MESSAGE = 200


def retry_at(policy: RetryPolicyBase, attempt: int, error: BaseException) -> datetime | None:
    """Time of the next attempt; None when there is none.

    Args:
        attempt: number of retries already made.
    """
    requests = _requests(error)
    if StopRetryingError in requests:
        return None
    # Not `isinstance`: it uses the exception's own `__class__`, which may be wrong or raise.
    exception = error if issubclass(type(error), Exception) else RuntimeError(one_line(error))
    moment = policy.schedule_retry(attempt, cast(Exception, exception))
    if moment is None and requests:
        delay = min(2 ** min(attempt, 12), _LONGEST_REQUESTED_DELAY_SECONDS)
        return datetime.now(UTC) + timedelta(seconds=delay)
    return moment


def _requests(error: BaseException) -> set[type[Exception]]:
    """Requests of an error: `StopRetryingError`, `TaskRetryRequestedError`. A group of errors, at any depth,
    counts only when each error in it makes a request.
    """
    found: set[type[Exception]] = set()
    left = [error]
    while left:
        error = left.pop()
        if issubclass(type(error), BaseExceptionGroup):
            left += BaseExceptionGroup.exceptions.__get__(error)
        elif issubclass(type(error), StopRetryingError):
            found.add(StopRetryingError)
        elif issubclass(type(error), TaskRetryRequestedError):
            found.add(TaskRetryRequestedError)
        else:
            return set()
    return found


def settle(execution: Execution, outcome: Outcome, settings: WorkerSettings) -> Settlement:
    """Settlement of a delivery. Never raises: what cannot be settled becomes a dead letter."""
    try:
        return _settlement(execution, outcome, settings)
    except BaseException as error:
        traceback = describe_exception(error, hide=execution.hide)["traceback"]
        logger.critical("the outcome of %s cannot be settled\n%s", execution.message.task_id, traceback)
        return _unsettled(execution, error, settings)


def _settlement(execution: Execution, outcome: Outcome, settings: WorkerSettings) -> Settlement:
    if isinstance(outcome, Failed):
        return _failed(execution, outcome, settings)
    if isinstance(outcome, LockRefused):
        return _refused(execution, outcome, settings)
    if isinstance(outcome, LeaseLost):
        return Settlement(execution.delivery, execution.locks)
    make = partial(TaskResult.from_value, outcome.value, outcome.seconds)
    return _ended(execution.delivery, execution.message, settings, None, make, outcome.seconds, execution.locks)


def _retry(execution: Execution, outcome: Failed, final: TaskMessage) -> DelayedRetry | None:
    """Retry to put into the delayed set; None when there is none.

    Args:
        final: the message with this attempt.
    """
    if execution.spec.task_class.at_most_once:
        return None
    attempt = execution.message.labels.get(LABEL_RETRIES, 0)
    try:
        again = retry_at(execution.spec.retry_policy(execution.task), attempt, outcome.error)
        # A delay, not a time: the worker's clock may differ from the server's.
        delay_ms = 0 if again is None else max(0, in_ms(again) - in_ms(datetime.now(UTC)))
    except BaseException as error:  # a policy is user code, as `execute` is
        traceback = describe_exception(error, hide=execution.hide)["traceback"]
        label = f"{final.task_name} {final.task_id}"
        logger.error("the retry policy of %s failed: no retry\n%s", label, traceback)
        return None
    return None if again is None else defer(execution.delivery, final.task_id, delay_ms, final.dumpb())


def defer(delivery: Delivery, task_id: str, delay_ms: int, data: bytes | None = None) -> DelayedRetry:
    """Arguments of lua/settle.lua that delay a message by `delay_ms` of the server's clock.

    `data` is the message after an attempt; without it, a task that has not started keeps its redelivery count.
    """
    return {
        "task": task_id,
        "delay_ms": delay_ms,
        "stream": queue_stream(delivery.stream),
        "data": data or delivery.data,
        "redeliveries": 0 if data else delivery.redelivery_count,
        "occurrence": delivery.occurrence,
    }


def _refused(execution: Execution, outcome: LockRefused, settings: WorkerSettings) -> Settlement:
    """Settlement when a custom lock was refused: a retry in `lock_retry_seconds` that counts no attempt."""
    delivery, message, seconds = execution.delivery, execution.message, settings.lock_retry_seconds
    error_info = describe_exception(UnableToAcquireLockError(outcome.reason))
    logger.info("%s %s waits %g s: %s", message.task_name, message.task_id, seconds, outcome.reason)
    again = defer(delivery, message.task_id, int(seconds * 1000))
    return Settlement(delivery, execution.locks, retry=again, **retry_effects(message, error_info, 0.0, seconds))


def requeue(delivery: Delivery) -> Settlement:
    """Settlement that requeues a delivery that has not started, for another worker to start at once."""
    return Settlement(delivery, requeue=_requeue_effect(delivery, delivery.data))


def _requeue_effect(delivery: Delivery, data: bytes | None) -> Requeue:
    return {"stream": resumed_stream(delivery.stream), "data": data, "since": delivery.since}


def defer_to_newer_worker(delivery: Delivery, error: Exception) -> Settlement:
    """Settlement that defers a message for workers of a later version, again and again, until one takes it."""
    task = (id_at_head(delivery.data or b"") or delivery.entry.encode()).decode(errors="replace")
    logger.warning("%s is left to workers of a later version: %s", task, error)
    again = defer(delivery, task, random.randint(*_NEWER_DELAYS_MS))
    again["redeliveries"] = max(again["redeliveries"], int(delivery.redelivered))  # it may have started
    return Settlement(delivery, retry=again)


def cancelled(delivery: Delivery, message: TaskMessage, settings: WorkerSettings) -> Settlement:
    """Settlement of a delivery that was cancelled before its start."""
    attributes = task_attributes(message)
    logger.warning("%s %s is cancelled before it has begun", *attributes.values(), extra=attributes)
    return _failure(
        delivery, message, settings, describe_exception(TaskCancelledError("cancelled before it had begun"))
    )


def _failed(execution: Execution, outcome: Failed, settings: WorkerSettings) -> Settlement:
    message, delivery, error_info = execution.message, execution.delivery, outcome.error_info
    task_class = execution.spec.task_class
    label = f"{message.task_name} {message.task_id}"
    end = partial(_failure, delivery, message, settings, error_info, outcome.seconds, execution.locks)
    again = partial(retry_effects, message, error_info, outcome.seconds)
    if issubclass(type(outcome.error), TaskCancelledError):
        return end()
    final = _with_attempt(execution, outcome)
    reason, detail = DeadLetterReason.EXHAUSTED, error_info["message"]
    if outcome.interrupted and not task_class.at_most_once:  # it starts again at once, a limited number of times
        times = sum(bool(each.get("interrupted")) for each in final.attempts)
        if times < settings.max_deliveries:
            _log(logging.WARNING, f"{label} was interrupted, and starts again", outcome)
            requeue = _requeue_effect(delivery, final.dumpb())
            return Settlement(delivery, execution.locks, requeue=requeue, **again(0.0))
        reason = DeadLetterReason.INTERRUPTED
        detail = f"interrupted {times} times, the last time by {error_info['type']}: {error_info['message']}"
        _log(logging.ERROR, f"{label} goes to the dead letters: {detail}", outcome)
    else:
        if (retry := _retry(execution, outcome, final)) is not None:
            _log(logging.WARNING, f"{label} failed, to be retried", outcome)
            return Settlement(delivery, execution.locks, retry=retry, **again(retry["delay_ms"] / 1000))
        if not task_class.dlq_eligible:
            _log(logging.ERROR, f"{label} failed permanently and is dropped (not dlq_eligible)", outcome)
            return end()
        _log(logging.ERROR, f"{label} failed permanently and goes to the dead letters", outcome)
    vo = vo_of_task(execution.task, message)
    return end(dead=DeadLetter.of_message(final, reason, detail, _delivery_id(delivery), vo))


def possibly_started(
    delivery: Delivery, message: TaskMessage, task_class: type[BaseTask], settings: WorkerSettings
) -> Settlement:
    """Settlement of a redelivered `at_most_once` task, which may have started elsewhere."""
    error_info = describe_exception(
        WorkerStoppedError("the worker that had it was lost, and the task may begin at most once (at_most_once)")
    )
    attributes = task_attributes(message)
    logger.error("%s %s has failed: %s", *attributes.values(), error_info["message"], extra=attributes)
    if not task_class.dlq_eligible:
        return _failure(delivery, message, settings, error_info)
    delivery_id, vo = _delivery_id(delivery), vo_of(task_class, message)
    detail = error_info["message"]
    dead_letter = DeadLetter.of_message(message, DeadLetterReason.EXHAUSTED, detail, delivery_id, vo)
    return _failure(delivery, message, settings, error_info, dead=dead_letter)


def _log(level: int, line: str, outcome: Failed) -> None:
    logger.log(level, "%s\n%s", line, outcome.error_info["traceback"].rstrip())


def _with_attempt(execution: Execution, outcome: Failed) -> TaskMessage:
    """The message with this attempt added. Decoded anew: the task may have changed its arguments."""
    assert execution.delivery.data is not None
    message = TaskMessage.loadb(execution.delivery.data)
    attempts = [*message.attempts, _attempt(outcome)]
    # Not `dataclasses.replace`, which drops the fields of a later version.
    message.labels[LABEL_ATTEMPTS] = truncate_attempts(attempts)
    message.labels[LABEL_RETRIES] = message.labels.get(LABEL_RETRIES, 0) + (not outcome.interrupted)
    message.trace_context = execution.message.trace_context
    return message


def truncate_attempts(attempts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All attempts; when they are too long together, the oldest with a shortened message and no traceback."""
    left, kept = _LONGEST_ATTEMPTS, []
    for attempt in reversed(attempts):
        left -= len(attempt.get("message", "")) + len(attempt.get("traceback", ""))
        shorter = {"message": cut(attempt.get("message", ""), _LONGEST_OLD_MESSAGE), "traceback": ""}
        kept.append(attempt if left >= 0 else {**attempt, **shorter})
    return kept[::-1]


def reject(
    delivery: Delivery,
    message: TaskMessage | None,
    vo: str | None,
    reason: str,
    detail: str,
    settings: WorkerSettings,
) -> Settlement:
    """Settlement of a delivery that cannot be executed."""
    detail = cut(detail)
    logger.error(
        "%s is put with the dead letters: %s: %s",
        delivery.entry if message is None else f"{message.task_name} {message.task_id}",
        reason,
        detail,
        extra=None if message is None else task_attributes(message),
    )
    if message is None:
        delivery_id = _delivery_id(delivery)
        dead_letter = DeadLetter(
            task_id=delivery_id,
            task_name="",
            reason=reason,
            detail=detail,
            data=delivery.raw,
            delivery_id=delivery_id,
        )
        return Settlement(delivery, dead=dead_letter.to_stored())
    error_info = describe_exception(TaskRejectedError(f"{reason}: {detail}"))
    dead_letter = DeadLetter.of_message(message, reason, detail, _delivery_id(delivery), vo)
    return _failure(delivery, message, settings, error_info, dead=dead_letter)


def _delivery_id(delivery: Delivery) -> str:
    """Unique id of the stream entry, the same for each worker that gets it."""
    return f"{delivery.stream}/{delivery.entry}"


def _unsettled(execution: Execution, error: BaseException, settings: WorkerSettings) -> Settlement:
    """Dead letter of an execution whose outcome cannot be settled, so that its entry and locks are released."""
    delivery = execution.delivery
    assert delivery.data is not None
    message = TaskMessage.loadb(delivery.data)  # decoded anew: the task may have changed its labels
    error_info = describe_exception(error, hide=execution.hide)
    detail, vo = f"{error_info['type']}: {error_info['message']}", vo_of_task(execution.task, message)
    dead = DeadLetter.of_message(message, DeadLetterReason.UNSETTLED, detail, _delivery_id(delivery), vo)
    return _failure(delivery, message, settings, error_info, locks=execution.locks, dead=dead)


def _attempt(outcome: Failed) -> dict[str, Any]:
    return {
        **outcome.error_info,
        "traceback": outcome.error_info["traceback"][-_LONGEST_ATTEMPT_TRACEBACK:],
        "host": socket.gethostname(),
        # As text: 0.7 cannot encode other types in the labels of a delayed task.
        "started": outcome.started.isoformat(),
        "ended": (outcome.started + timedelta(seconds=outcome.seconds)).isoformat(),
        **({"interrupted": True} if outcome.interrupted else {}),
    }


def _ended(
    delivery: Delivery,
    message: TaskMessage,
    settings: WorkerSettings,
    error: ErrorInfo | None,
    make: Callable[[], TaskResult[Any]],
    seconds: float,
    locks: Sequence[LockSpec],
) -> Settlement:
    ttl_seconds, longest = settings.result_ttl_seconds, settings.max_result_bytes
    return Settlement(delivery, locks, **completion_effects(message, make, error, seconds, ttl_seconds, longest))


def _failure(
    delivery: Delivery,
    message: TaskMessage,
    settings: WorkerSettings,
    error_info: ErrorInfo,
    seconds: float = 0.0,
    locks: Sequence[LockSpec] = (),
    *,
    dead: DeadLetter | None = None,
) -> Settlement:
    """Settlement of a delivery that has ended with an error; with `dead`, its dead letter is in it."""
    make = partial(TaskResult.from_error, error_info, seconds)
    settlement = _ended(delivery, message, settings, error_info, make, seconds, locks)
    if dead is not None:
        settlement.dead = dead.to_stored()
        settlement.release_results = None  # a resubmitted dead letter may need the results of its group's children
    return settlement
