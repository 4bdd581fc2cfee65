"""Settlement: what the broker is told about each outcome."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from ..broker.effects import completion_effects, retry_effects
from ..broker.labels import LABEL_ATTEMPTS, LABEL_RETRIES
from ..broker.models import Settlement, TaskMessage, TaskResult, id_at_head, in_ms
from ..broker.spans import task_attributes
from ..broker.streams import queue_stream, resumed_stream
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

#: A retry that was asked for, of a task whose policy gives none, waits 1 s, 2 s, 4 s … up to this.
_LONGEST_REQUESTED_DELAY_SECONDS = 3600
#: A message for workers of a later version comes again after so long.
_NEWER_DELAY_MS = 10_000
#: Characters of the traceback of a failed attempt, as it goes with the message.
_LONGEST_ATTEMPT_TRACEBACK = 4_000
#: Characters of messages and tracebacks of all attempts of a message, and of an old message beyond that.
_LONGEST_ATTEMPTS = 100_000
_LONGEST_OLD_MESSAGE = 200


def retry_at(policy: RetryPolicyBase, attempt: int, error: BaseException) -> datetime | None:
    """Time of the next attempt, or None for never.

    Args:
        attempt: number of retries already made.
    """
    requests = _requests(error)
    if StopRetryingError in requests:
        return None
    # By its true type: `isinstance` believes what the exception says of itself, and may raise.
    given = error if issubclass(type(error), Exception) else RuntimeError(one_line(error))
    moment = policy.schedule_retry(attempt, cast(Exception, given))
    if moment is None and requests:
        delay = min(2 ** min(attempt, 12), _LONGEST_REQUESTED_DELAY_SECONDS)
        return datetime.now(UTC) + timedelta(seconds=delay)
    return moment


def _requests(error: BaseException) -> set[type[Exception]]:
    """Requests of an error: `StopRetryingError`, `TaskRetryRequestedError`. A group of errors asks for
    something when all in it do, however deep they are.
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


def settle(
    execution: Execution, outcome: Outcome, settings: WorkerSettings
) -> tuple[Settlement, DeadLetter | None]:
    """Settlement of a delivery, and the dead letter to store before the broker is told."""
    if isinstance(outcome, Failed):
        return _failed(execution, outcome, settings)
    if isinstance(outcome, LockRefused):
        return _refused(execution, outcome, settings), None
    if isinstance(outcome, LeaseLost) or not _is_awaited(execution.message, settings):
        return Settlement(execution.delivery, execution.locks), None
    make = partial(TaskResult.from_value, outcome.value, outcome.seconds)
    return _ended(
        execution.delivery, execution.message, settings, None, make, outcome.seconds, execution.locks
    ), None


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
        # As the policy has it by our clock, which may be wrong: a delay goes by any clock.
        delay_ms = 0 if again is None else max(0, in_ms(again) - in_ms(datetime.now(UTC)))
    except BaseException as error:  # a policy is code of the task's author, as `execute` is
        told = describe_exception(error, hide=execution.hide)["traceback"]
        what = f"{final.task_name} {final.task_id}"
        logger.error("the retry policy of %s failed: no retry\n%s", what, told)
        return None
    return None if again is None else defer(execution.delivery, final.task_id, delay_ms, final.dumpb())


def defer(delivery: Delivery, task_id: str, delay_ms: int, data: bytes) -> DelayedRetry:
    """Arguments of lua/settle.lua that put a message into the delayed set for so long, by the server's clock."""
    stream = queue_stream(delivery.stream)
    again: DelayedRetry = {"task": task_id, "delay_ms": delay_ms, "stream": stream, "data": data}
    if delivery.occurrence is not None:
        again["occurrence"] = delivery.occurrence
    return again


def _refused(execution: Execution, outcome: LockRefused, settings: WorkerSettings) -> Settlement:
    """A delivery whose custom lock is not free: it comes again in `lock_retry_seconds`. No attempt is counted."""
    delivery, message, seconds = execution.delivery, execution.message, settings.lock_retry_seconds
    assert delivery.data is not None
    told = describe_exception(UnableToAcquireLockError(outcome.why))
    logger.info("%s %s waits %g s: %s", message.task_name, message.task_id, seconds, outcome.why)
    again = defer(delivery, message.task_id, int(seconds * 1000), delivery.data)
    return Settlement(delivery, execution.locks, retry=again, **retry_effects(message, told, 0.0, seconds))


def hand_back(delivery: Delivery) -> Settlement:
    """A delivery that was not begun, for another worker to start at once."""
    return Settlement(delivery, requeue=_requeue(delivery, delivery.data))


def _requeue(delivery: Delivery, data: bytes | None) -> Requeue:
    return {"stream": resumed_stream(delivery.stream), "data": data, "since": delivery.since}


def leave_to_newer(delivery: Delivery, error: Exception) -> Settlement:
    """A delivery for workers of a later version: it comes again a little later, until one of them takes it."""
    assert delivery.data is not None
    task = (id_at_head(delivery.data) or delivery.entry.encode()).decode(errors="replace")
    logger.warning("%s is left to workers of a later version: %s", task, error)
    return Settlement(delivery, retry=defer(delivery, task, _NEWER_DELAY_MS, delivery.data))


def cancelled(delivery: Delivery, message: TaskMessage, settings: WorkerSettings) -> Settlement:
    """Settlement of a delivery that was cancelled before it was begun."""
    which = task_attributes(message)
    logger.warning("%s %s is cancelled before it has begun", *which.values(), extra=which)
    return _failure(
        delivery, message, settings, describe_exception(TaskCancelledError("cancelled before it had begun"))
    )


def _failed(
    execution: Execution, outcome: Failed, settings: WorkerSettings
) -> tuple[Settlement, DeadLetter | None]:
    message, delivery, told = execution.message, execution.delivery, outcome.told
    task_class = execution.spec.task_class
    what = f"{message.task_name} {message.task_id}"
    end = partial(_failure, delivery, message, settings, told, outcome.seconds, execution.locks)
    again = partial(retry_effects, message, told, outcome.seconds)
    if issubclass(type(outcome.error), TaskCancelledError):
        return end(), None
    final = _with_attempt(execution, outcome)
    reason, detail = DeadLetterReason.EXHAUSTED, told["message"]
    if outcome.interrupted and not task_class.at_most_once:  # it starts again at once, and not for ever
        times = sum(bool(each.get("interrupted")) for each in final.attempts)
        if times < settings.max_deliveries:
            _log(logging.WARNING, f"{what} was interrupted, and starts again", outcome)
            requeue = _requeue(delivery, final.dumpb())
            return Settlement(delivery, execution.locks, requeue=requeue, **again(0.0)), None
        reason = DeadLetterReason.INTERRUPTED
        detail = f"interrupted {times} times, the last time by {told['type']}: {told['message']}"
        _log(logging.ERROR, f"{what} goes to the dead letters: {detail}", outcome)
    else:
        if (retry := _retry(execution, outcome, final)) is not None:
            _log(logging.WARNING, f"{what} failed, to be retried", outcome)
            return Settlement(delivery, execution.locks, retry=retry, **again(retry["delay_ms"] / 1000)), None
        if not task_class.dlq_eligible:
            _log(logging.ERROR, f"{what} failed permanently and is dropped (not dlq_eligible)", outcome)
            return end(), None
        _log(logging.ERROR, f"{what} failed permanently and goes to the dead letters", outcome)
    vo = vo_of_task(execution.task, message)
    return end(keep_results=True), DeadLetter.of_message(final, reason, detail, _delivery_id(delivery), vo)


def begun_before(
    delivery: Delivery, message: TaskMessage, task_class: type[BaseTask], settings: WorkerSettings
) -> tuple[Settlement, DeadLetter | None]:
    """Settlement of a delivery of a task that may have begun elsewhere and must not begin twice."""
    told = describe_exception(
        WorkerStoppedError("the worker that had it was lost, and the task may begin at most once (at_most_once)")
    )
    which = task_attributes(message)
    logger.error("%s %s has failed: %s", *which.values(), told["message"], extra=which)
    if not task_class.dlq_eligible:
        return _failure(delivery, message, settings, told), None
    where, vo = _delivery_id(delivery), vo_of(task_class, message)
    dead_letter = DeadLetter.of_message(message, DeadLetterReason.EXHAUSTED, told["message"], where, vo)
    return _failure(delivery, message, settings, told, keep_results=True), dead_letter


def _log(level: int, line: str, outcome: Failed) -> None:
    logger.log(level, "%s\n%s", line, outcome.told["traceback"].rstrip())


def _with_attempt(execution: Execution, outcome: Failed) -> TaskMessage:
    """The message with this attempt. As it was delivered: the task may have changed its arguments."""
    assert execution.delivery.data is not None
    message = TaskMessage.loadb(execution.delivery.data)
    attempts = [*message.attempts, _attempt(outcome)]
    # Not by `dataclasses.replace`, which leaves out the fields of a later version.
    message.labels[LABEL_ATTEMPTS] = truncate_attempts(attempts)
    message.labels[LABEL_RETRIES] = message.labels.get(LABEL_RETRIES, 0) + (not outcome.interrupted)
    message.trace_context = execution.message.trace_context
    return message


def truncate_attempts(attempts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All attempts; when they are too long together, the oldest ones without what is long in them."""
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
) -> tuple[Settlement, DeadLetter]:
    """Settlement of a delivery that cannot be executed: always a dead letter."""
    detail = cut(detail)
    logger.error(
        "%s is put with the dead letters: %s: %s",
        delivery.entry if message is None else f"{message.task_name} {message.task_id}",
        reason,
        detail,
        extra=None if message is None else task_attributes(message),
    )
    if message is None:
        where = _delivery_id(delivery)
        return Settlement(delivery), DeadLetter(
            task_id=where, task_name="", reason=reason, detail=detail, data=delivery.raw, delivery_id=where
        )
    told = describe_exception(TaskRejectedError(f"{reason}: {detail}"))
    settlement = _failure(delivery, message, settings, told, keep_results=True)
    return settlement, DeadLetter.of_message(message, reason, detail, _delivery_id(delivery), vo)


def _delivery_id(delivery: Delivery) -> str:
    """The same for everybody who has this delivery in hand, and never again."""
    return f"{delivery.stream}/{delivery.entry}"


def unsettled(
    execution: Execution, error: BaseException, settings: WorkerSettings
) -> tuple[Settlement, DeadLetter]:
    """Settlement of an execution whose outcome cannot be put into words: nothing may stay behind of it."""
    message = execution.message
    assert execution.delivery.data is not None
    told = describe_exception(error, hide=execution.hide)
    dead_letter = DeadLetter(
        task_id=message.task_id,
        task_name=message.task_name,
        vo=vo_of_task(execution.task, message),
        reason=DeadLetterReason.UNSETTLED,
        detail=f"{told['type']}: {told['message']}",
        data=execution.delivery.data,
        delivery_id=_delivery_id(execution.delivery),
    )
    return _failure(execution.delivery, message, settings, told, locks=execution.locks), dead_letter


def _attempt(outcome: Failed) -> dict[str, Any]:
    return {
        **outcome.told,
        "traceback": outcome.told["traceback"][-_LONGEST_ATTEMPT_TRACEBACK:],
        "host": socket.gethostname(),
        # As text: 0.7 has no way for other types in the labels of what is delayed.
        "started": outcome.started.isoformat(),
        "ended": (outcome.started + timedelta(seconds=outcome.seconds)).isoformat(),
        **({"interrupted": True} if outcome.interrupted else {}),
    }


def _is_awaited(message: TaskMessage, settings: WorkerSettings) -> bool:
    """True if its result is kept, or a group counts on it."""
    return bool(message.labels) or settings.result_ttl_seconds is not None


def _ended(
    delivery: Delivery,
    message: TaskMessage,
    settings: WorkerSettings,
    error: ErrorInfo | None,
    make: Callable[[], TaskResult[Any]],
    seconds: float,
    locks: Sequence[LockSpec],
) -> Settlement:
    if not _is_awaited(message, settings):
        return Settlement(delivery, locks)
    ttl_seconds, longest = settings.result_ttl_seconds, settings.max_result_bytes
    return Settlement(delivery, locks, **completion_effects(message, make, error, seconds, ttl_seconds, longest))


def _failure(
    delivery: Delivery,
    message: TaskMessage,
    settings: WorkerSettings,
    told: ErrorInfo,
    seconds: float = 0.0,
    locks: Sequence[LockSpec] = (),
    *,
    keep_results: bool = False,
) -> Settlement:
    """Settlement of a delivery that has ended by an error.

    Args:
        keep_results: those of the children of its group: a dead letter that is submitted again may want them.
    """
    make = partial(TaskResult.from_error, told, seconds)
    settlement = _ended(delivery, message, settings, told, make, seconds, locks)
    if keep_results:
        settlement.release_results = None
    return settlement
