"""Settlement: what the broker is told about each outcome."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from ..broker.effects import group_effect, release_results, result_effect, schedule_outcome, touch_group
from ..broker.labels import LABEL_ATTEMPTS, LABEL_RETRIES
from ..broker.models import Settlement, TaskMessage, TaskResult, id_at_head, in_ms
from ..broker.spans import task_attributes
from ..broker.streams import queue_stream, resumed_stream
from ..exceptions import (
    StopRetryingError,
    TaskCancelledError,
    TaskRejectedError,
    TaskRetryRequestedError,
    WorkerStoppedError,
)
from ..messages.error_info import ErrorInfo, cut, describe_exception, one_line
from ..persistence.dead_letter import DeadLetter, DeadLetterReason
from ..task_vo import vo_of, vo_of_task
from .execution import Failed, LeaseLost, Outcome, Succeeded

if TYPE_CHECKING:
    from ..base_task import BaseTask
    from ..broker.models import Delivery
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
    """When to try again, or None for never.

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
    """What the error asks for: `StopRetryingError`, `TaskRetryRequestedError`. A group of errors asks for
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
    """What becomes of a delivery, and the dead letter to store before the broker is told."""
    settlement = Settlement(execution.delivery, locks=execution.locks)
    message = execution.message
    if isinstance(outcome, Succeeded):
        if _is_awaited(message, settings):
            make = partial(TaskResult.from_value, outcome.value, outcome.seconds)
            _ended(settlement, message, settings, None, make, outcome.seconds)
        return settlement, None
    if isinstance(outcome, LeaseLost):
        return settlement, None
    return settlement, _failed(execution, outcome, settlement, settings)


def _retry(execution: Execution, outcome: Failed, final: TaskMessage) -> dict[str, Any] | None:
    """What is put aside for the next attempt; None when there is none.

    Args:
        final: the message with this attempt.
    """
    attempt = execution.message.labels.get(LABEL_RETRIES, 0)
    again = retry_at(execution.spec.retry_policy(execution.task), attempt, outcome.error)
    if again is None:
        return None
    # As the policy has it by our clock, which may be wrong: a delay goes by any clock.
    delay_ms = max(0, in_ms(again) - in_ms(datetime.now(UTC)))
    return defer(execution.delivery, final.task_id, delay_ms, final.dumpb())


def defer(delivery: Delivery, task_id: str, delay_ms: int, data: bytes) -> dict[str, Any]:
    """What lua/settle.lua needs to put a message into the delayed set for so long, by the server's clock."""
    stream = queue_stream(delivery.stream)
    again: dict[str, Any] = {"task": task_id, "delay_ms": delay_ms, "stream": stream, "data": data}
    if delivery.occurrence is not None:
        again["occurrence"] = delivery.occurrence
    return again


def hand_back(delivery: Delivery, data: bytes | None = None) -> Settlement:
    """A delivery that was not begun, for another worker to start at once.

    Args:
        data: the message, if it is another one by now.
    """
    stream = resumed_stream(delivery.stream)
    again = {"stream": stream, "data": delivery.data if data is None else data, "since": delivery.since}
    return Settlement(delivery, requeue=again)


def leave_to_newer(delivery: Delivery, error: Exception) -> Settlement:
    """A delivery for workers of a later version: it comes again a little later, until one of them takes it."""
    assert delivery.data is not None
    task = (id_at_head(delivery.data) or delivery.entry.encode()).decode(errors="replace")
    logger.warning("%s is left to workers of a later version: %s", task, error)
    return Settlement(delivery, retry=defer(delivery, task, _NEWER_DELAY_MS, delivery.data))


def cancelled(delivery: Delivery, message: TaskMessage, settings: WorkerSettings) -> Settlement:
    """What becomes of a delivery that was cancelled before it was begun."""
    which = task_attributes(message)
    logger.warning("%s %s is cancelled before it has begun", *which.values(), extra=which)
    settlement = Settlement(delivery)
    error = TaskCancelledError("cancelled before it had begun")
    _failed_with(settlement, message, settings, describe_exception(error))
    return settlement


def _failed(
    execution: Execution, outcome: Failed, settlement: Settlement, settings: WorkerSettings
) -> DeadLetter | None:
    message = execution.message
    what = f"{message.task_name} {message.task_id}"
    if issubclass(type(outcome.error), TaskCancelledError):
        _failed_with(settlement, message, settings, outcome.told, outcome.seconds)
        return None
    final = _with_attempt(execution, outcome)
    at_most_once = execution.spec.task_class.at_most_once
    if outcome.interrupted and not at_most_once:
        return _interrupted(execution, outcome, settlement, final, settings)
    try:
        retry = None if at_most_once else _retry(execution, outcome, final)
    except BaseException as error:  # a policy is code of the task's author, as `execute` is
        told = describe_exception(error, hide=execution.hide)["traceback"]
        logger.error("the retry policy of %s failed: no retry\n%s", what, told)
        retry = None
    if retry is not None:
        _log(logging.WARNING, f"{what} failed, to be retried", outcome)
        settlement.retry = retry
        settlement.group = touch_group(message)
        settlement.outcome = schedule_outcome(message, outcome.told, outcome.seconds, retry["delay_ms"] / 1000)
        return None
    _failed_with(settlement, message, settings, outcome.told, outcome.seconds)
    if not execution.spec.task_class.dlq_eligible:
        _log(logging.ERROR, f"{what} failed for good and is dropped (not dlq_eligible)", outcome)
        return None
    _log(logging.ERROR, f"{what} failed for good and goes to the dead letters", outcome)
    settlement.collected = None  # whoever takes the letter up again may want the results of its children
    where = _burial(execution.delivery)
    vo = vo_of_task(execution.task, message)
    return DeadLetter.of_message(final, DeadLetterReason.EXHAUSTED, outcome.told["message"], where, vo)


def _interrupted(
    execution: Execution, outcome: Failed, settlement: Settlement, final: TaskMessage, settings: WorkerSettings
) -> DeadLetter | None:
    """It starts again at once, as after a crash, and not for ever."""
    message, delivery = execution.message, execution.delivery
    what = f"{message.task_name} {message.task_id}"
    times = sum(bool(each.get("interrupted")) for each in final.attempts)
    if times < settings.max_deliveries:
        _log(logging.WARNING, f"{what} was interrupted, and starts again", outcome)
        settlement.requeue = hand_back(delivery, final.dumpb()).requeue
        settlement.group = touch_group(message)
        settlement.outcome = schedule_outcome(message, outcome.told, outcome.seconds, 0.0)
        return None
    detail = f"interrupted {times} times, the last time by {outcome.told['type']}: {outcome.told['message']}"
    _log(logging.ERROR, f"{what} goes to the dead letters: {detail}", outcome)
    _failed_with(settlement, message, settings, outcome.told, outcome.seconds)
    settlement.collected = None
    vo = vo_of_task(execution.task, message)
    return DeadLetter.of_message(final, DeadLetterReason.INTERRUPTED, detail, _burial(delivery), vo)


def begun_before(
    delivery: Delivery, message: TaskMessage, task_class: type[BaseTask], settings: WorkerSettings
) -> tuple[Settlement, DeadLetter | None]:
    """What becomes of a delivery of a task that may have begun elsewhere and must not begin twice."""
    told = describe_exception(
        WorkerStoppedError("the worker that had it was lost, and the task may begin at most once (at_most_once)")
    )
    which = task_attributes(message)
    logger.error("%s %s has failed: %s", *which.values(), told["message"], extra=which)
    settlement = Settlement(delivery)
    _failed_with(settlement, message, settings, told)
    if not task_class.dlq_eligible:
        return settlement, None
    settlement.collected = None
    where, vo = _burial(delivery), vo_of(task_class, message)
    return settlement, DeadLetter.of_message(message, DeadLetterReason.EXHAUSTED, told["message"], where, vo)


def _log(level: int, line: str, outcome: Failed) -> None:
    logger.log(level, "%s\n%s", line, outcome.told["traceback"].rstrip())


def _with_attempt(execution: Execution, outcome: Failed) -> TaskMessage:
    """The message with this attempt. As it was delivered: the task may have changed its arguments."""
    assert execution.delivery.data is not None
    message = TaskMessage.loadb(execution.delivery.data)
    attempts = [*message.attempts, _attempt(outcome)]
    # Not by `dataclasses.replace`, which leaves out the fields of a later version.
    message.labels[LABEL_ATTEMPTS] = fitting_attempts(attempts)
    message.labels[LABEL_RETRIES] = message.labels.get(LABEL_RETRIES, 0) + (not outcome.interrupted)
    message.trace_context = execution.message.trace_context
    return message


def fitting_attempts(attempts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All attempts; when they are too long together, the oldest ones without what is long in them."""
    left, fitting = _LONGEST_ATTEMPTS, []
    for attempt in reversed(attempts):
        left -= len(attempt.get("message", "")) + len(attempt.get("traceback", ""))
        shorter = {"message": cut(attempt.get("message", ""), _LONGEST_OLD_MESSAGE), "traceback": ""}
        fitting.append(attempt if left >= 0 else {**attempt, **shorter})
    return fitting[::-1]


def reject(
    delivery: Delivery,
    message: TaskMessage | None,
    vo: str | None,
    reason: str,
    detail: str,
    settings: WorkerSettings,
) -> tuple[Settlement, DeadLetter]:
    """What becomes of a delivery that cannot be executed: always a dead letter."""
    detail = cut(detail)
    logger.error(
        "%s is put with the dead letters: %s: %s",
        delivery.entry if message is None else f"{message.task_name} {message.task_id}",
        reason,
        detail,
        extra=None if message is None else task_attributes(message),
    )
    if message is None:
        where = _burial(delivery)
        return Settlement(delivery), DeadLetter(
            task_id=where, task_name="", reason=reason, detail=detail, data=delivery.raw, delivery_id=where
        )
    settlement = Settlement(delivery)
    _failed_with(settlement, message, settings, describe_exception(TaskRejectedError(f"{reason}: {detail}")))
    settlement.collected = None
    return settlement, DeadLetter.of_message(message, reason, detail, _burial(delivery), vo)


def _burial(delivery: Delivery) -> str:
    """The same for everybody who has this delivery in hand, and never again."""
    return f"{delivery.stream}/{delivery.entry}"


def unsettled(
    execution: Execution, error: BaseException, settings: WorkerSettings
) -> tuple[Settlement, DeadLetter]:
    """What becomes of an execution whose outcome cannot be put into words: nothing may stay behind of it."""
    message = execution.message
    assert execution.delivery.data is not None
    told = describe_exception(error, hide=execution.hide)
    letter = DeadLetter(
        task_id=message.task_id,
        task_name=message.task_name,
        vo=vo_of_task(execution.task, message),
        reason=DeadLetterReason.UNSETTLED,
        detail=f"{told['type']}: {told['message']}",
        data=execution.delivery.data,
        delivery_id=_burial(execution.delivery),
    )
    settlement = Settlement(execution.delivery, locks=execution.locks)
    _failed_with(settlement, message, settings, told)
    return settlement, letter


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
    """Whether somebody waits for its end, or a group counts on it."""
    return bool(message.labels) or settings.result_ttl_seconds is not None


def _ended(
    settlement: Settlement,
    message: TaskMessage,
    settings: WorkerSettings,
    error: ErrorInfo | None,
    make: Callable[[], TaskResult[Any]],
    seconds: float = 0.0,
) -> None:
    """What follows from the end of a task, however it ended."""
    if not _is_awaited(message, settings):
        return
    longest = settings.max_result_bytes
    settlement.result = result_effect(message, settings.result_ttl_seconds, make, longest)
    settlement.group = group_effect(message, error, make, longest)
    settlement.collected = release_results(message)
    settlement.outcome = schedule_outcome(message, error, seconds)


def _failed_with(
    settlement: Settlement,
    message: TaskMessage,
    settings: WorkerSettings,
    told: ErrorInfo,
    seconds: float = 0.0,
) -> None:
    """What follows from its end by an error."""
    _ended(settlement, message, settings, told, partial(TaskResult.from_error, told, seconds), seconds)
