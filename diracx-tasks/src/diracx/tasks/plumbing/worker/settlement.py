"""Settlement: what the broker is told about each outcome, and the pipeline it is told through."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from ..broker import keys
from ..broker.ending import Told, child_ended, child_lives, collected, schedule_outcome, stored_result
from ..broker.models import (
    LABEL_ATTEMPTS,
    Settlement,
    TaskMessage,
    TaskResult,
    describe_exception,
)
from ..broker.redis_streams import in_ms
from ..exceptions import StopRetryingError, TaskCancelledError, TaskRejectedError, TaskRetryRequestedError
from ..patience import patiently
from ..persistence.letter import DeadLetter, DeadLetterReason
from ..secrets import without_secrets
from ..task_vo import vo_of_task
from .outcome import Failed, Outcome, Succeeded, TakenOver

if TYPE_CHECKING:
    from ..broker import RedisStreamBroker
    from ..broker.models import Delivery
    from ..retry_policies import RetryPolicyBase
    from .execution import Execution
    from .keeper import LeaseKeeper
    from .settings import WorkerSettings

logger = logging.getLogger(__name__)

#: A retry that was asked for, of a task whose policy gives none, waits 1 s, 2 s, 4 s … up to this.
_LONGEST_REQUESTED_DELAY_SECONDS = 3600


def retry_at(policy: RetryPolicyBase, attempt: int, error: BaseException) -> datetime | None:
    """When to try again, or None for never.

    Args:
        attempt: number of retries already made.
    """
    if isinstance(error, StopRetryingError):
        return None
    given = error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")
    moment = policy.schedule_retry(attempt, given)
    if moment is None and isinstance(error, TaskRetryRequestedError):
        delay = min(2 ** min(attempt, 12), _LONGEST_REQUESTED_DELAY_SECONDS)
        return datetime.now(UTC) + timedelta(seconds=delay)
    return moment


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
    if isinstance(outcome, TakenOver):
        return settlement, None
    return settlement, _failed(execution, outcome, settlement, settings)


def _retry(execution: Execution, outcome: Failed, attempts: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What is put aside for the next attempt, or None when there is none."""
    message = execution.message
    again = retry_at(execution.blueprint.retry_policy(execution.task), len(message.attempts), outcome.error)
    if again is None:
        return None
    return {
        "task": message.task_id,
        # As the policy has it by our clock, which may be wrong: a delay goes by any clock.
        "delay_ms": max(0, in_ms(again) - in_ms(datetime.now(UTC))),
        "stream": execution.delivery.stream.removesuffix(keys.HANDOVER),
        "data": replace(message, labels={**message.labels, LABEL_ATTEMPTS: attempts}).dumpb(),
    }


def hand_back(delivery: Delivery) -> Settlement:
    """A delivery that was not begun, for another worker to start at once."""
    stream = delivery.stream.removesuffix(keys.HANDOVER) + keys.HANDOVER
    again = {"stream": stream, "data": delivery.data, "since": delivery.since, "deaths": delivery.deaths}
    return Settlement(delivery, requeue=again)


def cancelled(delivery: Delivery, message: TaskMessage, settings: WorkerSettings) -> Settlement:
    """What becomes of a delivery that was cancelled before it was begun."""
    logger.warning("%s %s is cancelled before it has begun", message.task_name, message.task_id)
    settlement = Settlement(delivery, cancelled=message.task_id)
    error = TaskCancelledError("cancelled before it had begun")
    _failed_with(settlement, message, settings, error)
    return settlement


def _failed(
    execution: Execution, outcome: Failed, settlement: Settlement, settings: WorkerSettings
) -> DeadLetter | None:
    message = execution.message
    attempts = [*message.attempts, _attempt(outcome, execution)]
    what = f"{message.task_name} {message.task_id}"
    if isinstance(outcome.error, TaskCancelledError):
        _failed_with(settlement, message, settings, outcome.error, outcome.seconds)
        return None
    try:
        retry = _retry(execution, outcome, attempts)
    except Exception:
        logger.exception("the retry policy of %s failed: no retry", what)
        retry = None
    if retry is not None:
        _log(logging.WARNING, f"{what} failed, to be retried", execution, outcome)
        settlement.retry = retry
        settlement.group = child_lives(message)
        settlement.outcome = schedule_outcome(message, attempts[-1], outcome.seconds, retry["delay_ms"] / 1000)
        return None
    _failed_with(settlement, message, settings, outcome.error, outcome.seconds, _hiding(execution))
    if not execution.blueprint.task_class.dlq_eligible:
        _log(logging.ERROR, f"{what} failed for good and is dropped (not dlq_eligible)", execution, outcome)
        return None
    _log(logging.ERROR, f"{what} failed for good and goes to the dead letters", execution, outcome)
    settlement.collected = None  # whoever takes the letter up again may want the results of its children
    final = replace(message, labels={**message.labels, LABEL_ATTEMPTS: attempts})
    where = _burial(execution.delivery)
    vo = vo_of_task(execution.task, message)
    return DeadLetter.of_message(final, DeadLetterReason.EXHAUSTED, attempts[-1]["message"], where, vo)


def _log(level: int, line: str, execution: Execution, outcome: Failed) -> None:
    if not execution.blueprint.task_class.secret_fields:
        logger.log(level, "%s", line, exc_info=outcome.error)
        return
    told = describe_exception(outcome.error, hide=_hiding(execution))["traceback"]
    logger.log(level, "%s\n%s", line, told)


def reject(
    delivery: Delivery,
    message: TaskMessage | None,
    vo: str | None,
    reason: str,
    detail: str,
    settings: WorkerSettings,
) -> tuple[Settlement, DeadLetter]:
    """What becomes of a delivery that cannot be executed: always a dead letter."""
    logger.error(
        "%s is put with the dead letters: %s: %s",
        delivery.entry if message is None else f"{message.task_name} {message.task_id}",
        reason,
        detail,
    )
    if message is None:
        where = _burial(delivery)
        return Settlement(delivery), DeadLetter(
            task_id=where, task_name="", reason=reason, detail=detail, data=delivery.raw, burial=where
        )
    settlement = Settlement(delivery)
    _failed_with(settlement, message, settings, TaskRejectedError(f"{reason}: {detail}"))
    settlement.collected = None
    return settlement, DeadLetter.of_message(message, reason, detail, _burial(delivery), vo)


def _burial(delivery: Delivery) -> str:
    """The same for everybody who has this delivery in hand, and never again."""
    return f"{delivery.stream}/{delivery.entry}"


def unsettled(execution: Execution, error: Exception, settings: WorkerSettings) -> tuple[Settlement, DeadLetter]:
    """What becomes of an execution whose outcome cannot be put into words: nothing may stay behind of it."""
    message = execution.message
    assert execution.delivery.data is not None
    letter = DeadLetter(
        task_id=message.task_id,
        task_name=message.task_name,
        vo=vo_of_task(execution.task, message),
        reason=DeadLetterReason.UNSETTLED,
        detail=without_secrets(f"{type(error).__name__}: {error}", execution.task),
        data=execution.delivery.data,
        burial=_burial(execution.delivery),
    )
    settlement = Settlement(execution.delivery, locks=execution.locks)
    _failed_with(settlement, message, settings, error, hide=_hiding(execution))
    return settlement, letter


def _attempt(outcome: Failed, execution: Execution) -> dict[str, Any]:
    return {
        **describe_exception(outcome.error, longest=4_000, hide=_hiding(execution)),
        "host": socket.gethostname(),
        "started": outcome.started,
        "ended": outcome.started + timedelta(seconds=outcome.seconds),
    }


def _is_awaited(message: TaskMessage, settings: WorkerSettings) -> bool:
    """Whether somebody waits for its end, or a group counts on it."""
    return bool(message.labels) or settings.result_ttl_seconds is not None


def _ended(
    settlement: Settlement,
    message: TaskMessage,
    settings: WorkerSettings,
    error: Told | None,
    make: Callable[[], TaskResult[Any]],
    seconds: float = 0.0,
) -> None:
    """What follows from the end of a task, however it ended."""
    if not _is_awaited(message, settings):
        return
    settlement.result = stored_result(message, settings.result_ttl_seconds, make)
    settlement.group = child_ended(message, error, make)
    settlement.collected = collected(message)
    settlement.outcome = schedule_outcome(message, error, seconds)


def _failed_with(
    settlement: Settlement,
    message: TaskMessage,
    settings: WorkerSettings,
    error: BaseException,
    seconds: float = 0.0,
    hide: Callable[[str], str] | None = None,
) -> None:
    """What follows from its end by an error, of which nothing is told that is to be hidden."""
    if not message.labels and settings.result_ttl_seconds is None:
        return  # a traceback costs more than all the rest
    told = describe_exception(error, hide=hide)
    make = partial(TaskResult.from_exception, error, seconds, told=told)
    _ended(settlement, message, settings, told, make, seconds)


def _hiding(execution: Execution) -> Callable[[str], str] | None:
    """What takes the task's secrets out of a text; None where it has none."""
    if not execution.blueprint.task_class.secret_fields:
        return None
    return partial(without_secrets, task=execution.task)


class Settler:
    """Sends settlements. Those that come together share a round trip; none is lost while the server is away.

    Args:
        settled: is told of those that have been sent and are held no more.
    """

    def __init__(
        self, broker: RedisStreamBroker, keeper: LeaseKeeper, settled: Callable[[Sequence[Delivery]], None]
    ) -> None:
        self._broker = broker
        self._keeper = keeper
        self._settled = settled
        self._waiting: list[Settlement] = []
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def add(self, settlement: Settlement) -> None:
        """To be sent with the next batch."""
        if not self._waiting:
            self._idle.clear()
            self._work.set()
        self._waiting.append(settlement)

    async def run(self) -> None:
        """Send what there is, for ever."""
        while True:
            await self._work.wait()
            # What ends in the same round of the event loop goes together; and the question for new messages,
            # which is quickly answered, goes first.
            await asyncio.sleep(0)
            self._work.clear()
            batch, self._waiting = self._waiting, []
            try:
                accepted = await self._send(batch)
            except Exception:
                # One of them is not acceptable to the server; the others must not suffer for it.
                accepted = [await self._send_alone(settlement) for settlement in batch]
            deliveries = [settlement.delivery for settlement in batch]
            self._keeper.forget(deliveries)
            self._settled(deliveries)
            if not all(accepted):
                for settlement, ours in zip(batch, accepted, strict=True):
                    if not ours:
                        logger.warning("%s was not ours to settle any more", settlement.delivery.entry)
            if not self._waiting:
                self._idle.set()

    async def _send(self, batch: Sequence[Settlement]) -> list[bool]:
        replies = await patiently(partial(self._broker.settle, batch, self._keeper.epoch), "settle tasks")
        answers = [bool(ours) for ours in replies]
        if None in replies:  # the server has lost its data: it must learn first what we hold
            await patiently(self._keeper.renew, "renew the lease")
            unknown = [position for position, ours in enumerate(replies) if ours is None]
            again = await self._send([batch[position] for position in unknown])
            for position, ours in zip(unknown, again, strict=True):
                answers[position] = ours
        return answers

    async def _send_alone(self, settlement: Settlement) -> bool:
        try:
            [ours] = await self._send([settlement])
        except Exception:
            entry = settlement.delivery.entry
            logger.critical("what follows on %s is refused by the server and left out", entry, exc_info=True)
            [ours] = await self._send([Settlement(settlement.delivery, locks=settlement.locks)])
        return ours

    async def drained(self) -> None:
        """Return when everything that was added has been sent."""
        await self._idle.wait()
