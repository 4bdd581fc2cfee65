"""Settlement: what the broker is told about each outcome, and the pipeline it is told through."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from ..broker import keys
from ..broker.ending import child_ended, child_lives, collected, stored_result
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
from ..persistence.letter import DeadLetter
from .outcome import Failed, Outcome, Succeeded, TakenOver

if TYPE_CHECKING:
    from ..broker import RedisStreamBroker
    from ..broker.models import Delivery
    from ..retry_policies import RetryPolicyBase
    from .execution import Execution
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
    match outcome:
        case Succeeded(value, seconds):
            _ended(settlement, message, settings, None, lambda: TaskResult.from_value(value, seconds))
            return settlement, None
        case TakenOver():
            return settlement, None
        case Failed():
            return settlement, _failed(execution, outcome, settlement, settings)


def hand_back(delivery: Delivery) -> Settlement:
    """A delivery that was not begun, for another worker to start at once."""
    stream = delivery.stream.removesuffix(keys.HANDOVER) + keys.HANDOVER
    return Settlement(delivery, requeue={"stream": stream, "data": delivery.data, "since": delivery.since})


def cancelled(delivery: Delivery, message: TaskMessage, settings: WorkerSettings) -> Settlement:
    """What becomes of a delivery that was cancelled before it was begun."""
    logger.warning("%s %s is cancelled before it has begun", message.task_name, message.task_id)
    settlement = Settlement(delivery, cancelled=message.task_id)
    error = TaskCancelledError("cancelled before it had begun")
    _ended(settlement, message, settings, error, lambda: TaskResult.from_exception(error, 0.0))
    return settlement


def _failed(
    execution: Execution, outcome: Failed, settlement: Settlement, settings: WorkerSettings
) -> DeadLetter | None:
    message = execution.message
    attempts = [*message.attempts, _attempt(outcome)]
    what = f"{message.task_name} {message.task_id}"
    if isinstance(outcome.error, TaskCancelledError):
        _ended(settlement, message, settings, outcome.error, partial(_failure, outcome))
        return None
    try:
        again = retry_at(execution.blueprint.retry_policy(execution.task), len(message.attempts), outcome.error)
    except Exception:
        logger.exception("the retry policy of %s failed: no retry", what)
        again = None
    if again is not None:
        logger.warning("%s failed, to be retried at %s", what, again.isoformat(), exc_info=outcome.error)
        message.labels[LABEL_ATTEMPTS] = attempts
        settlement.retry = {
            "task": message.task_id,
            "due": in_ms(again),
            "stream": execution.delivery.stream.removesuffix(keys.HANDOVER),
            "data": message.dumpb(),
        }
        settlement.group = child_lives(message)
        return None
    _ended(settlement, message, settings, outcome.error, partial(_failure, outcome))
    if not execution.blueprint.task_class.dlq_eligible:
        logger.error("%s failed for good and is dropped (not dlq_eligible)", what, exc_info=outcome.error)
        return None
    logger.error("%s failed for good and goes to the dead letters", what, exc_info=outcome.error)
    message.labels[LABEL_ATTEMPTS] = attempts
    settlement.collected = None  # whoever takes the letter up again may want the results of its children
    return DeadLetter.of_message(message, "exhausted", str(outcome.error))


def reject(
    delivery: Delivery, message: TaskMessage | None, reason: str, detail: str, settings: WorkerSettings
) -> tuple[Settlement, DeadLetter]:
    """What becomes of a delivery that cannot be executed: always a dead letter."""
    logger.error(
        "%s is put with the dead letters: %s: %s",
        delivery.entry if message is None else f"{message.task_name} {message.task_id}",
        reason,
        detail,
    )
    if message is None:
        where = f"{delivery.stream}/{delivery.entry}"
        return Settlement(delivery), DeadLetter(
            task_id=where, task_name="", reason=reason, detail=detail, data=delivery.raw
        )
    settlement = Settlement(delivery)
    error = TaskRejectedError(f"{reason}: {detail}")
    _ended(settlement, message, settings, error, lambda: TaskResult.from_exception(error, 0.0))
    settlement.collected = None
    return settlement, DeadLetter.of_message(message, reason, detail)


def _attempt(outcome: Failed) -> dict[str, Any]:
    return {
        **describe_exception(outcome.error, longest=4_000),
        "host": socket.gethostname(),
        "started": outcome.started,
        "ended": outcome.started + timedelta(seconds=outcome.seconds),
    }


def _ended(
    settlement: Settlement,
    message: TaskMessage,
    settings: WorkerSettings,
    error: BaseException | None,
    make: Callable[[], TaskResult[Any]],
) -> None:
    """What follows from the end of a task, however it ended."""
    settlement.result = stored_result(message, settings.result_ttl_seconds, make)
    settlement.group = child_ended(message, error, make)
    settlement.collected = collected(message)


def _failure(outcome: Failed) -> TaskResult[Any]:
    return TaskResult.from_exception(outcome.error, outcome.seconds)


class Settler:
    """Sends settlements. Those that come together share a round trip; none is lost while the server is away."""

    def __init__(self, broker: RedisStreamBroker, settled: Callable[[Delivery], None]) -> None:
        self._broker = broker
        self._settled = settled
        self._waiting: list[Settlement] = []
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def add(self, settlement: Settlement) -> None:
        """To be sent with the next batch."""
        self._waiting.append(settlement)
        self._idle.clear()
        self._work.set()

    async def run(self) -> None:
        """Send what there is, for ever."""
        while True:
            await self._work.wait()
            self._work.clear()
            batch, self._waiting = self._waiting, []
            accepted = await patiently(partial(self._broker.settle, batch), "settle tasks")
            for settlement, ours in zip(batch, accepted, strict=True):
                self._settled(settlement.delivery)
                if not ours:
                    logger.warning(
                        "%s was taken over by another worker: nothing changed", settlement.delivery.entry
                    )
            if not self._waiting:
                self._idle.set()

    async def drained(self) -> None:
        """Return when everything that was added has been sent."""
        await self._idle.wait()
