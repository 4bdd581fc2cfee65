"""The executor: takes deliveries to their settlements. The steps are in the order in which a task passes them."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from .._util.retrying import is_transient, may_pass, reason, retry_until_available
from ..broker.locking import can_be_packed
from ..broker.models import TaskMessage
from ..broker.sizes import LOCK_BYTES, in_calls
from ..broker.spans import set_task_log_context
from ..broker.streams import resumed_stream
from ..enums import Priority
from ..exceptions import NewerMessageError
from ..messages.error_info import describe_exception, one_line
from ..messages.secrets import without_secrets_of
from ..persistence.dead_letter import DeadLetterReason
from ..task_vo import vo_of
from .execution import Execution, Failed, note_settlement, processing_span
from .settlement import begun_before, cancelled, hand_back, leave_to_newer, reject, settle, unsettled

if TYPE_CHECKING:
    from ..broker import RedisStreamBroker
    from ..broker.models import Delivery, Settlement
    from ..broker.requests import LockSpec, StartRequest
    from ..persistence import DeadLetter
    from .control_channel import ControlChannel
    from .dead_letters import DeadLetterStore
    from .dependencies import Dependencies
    from .execution import Outcome
    from .intake import Intake
    from .keeper import LeaseKeeper
    from .reporter import Reporter
    from .settings import WorkerSettings
    from .settler import Settler
    from .task_spec import TaskSpec

logger = logging.getLogger(__name__)

#: How long the database has to store dead letters when the worker stops, before they go to Redis.
_DATABASE_SECONDS = 2.0
#: How long a stopping worker asks what it has reserved and not begun.
_RECOVER_SECONDS = 2.0
_RANK = {priority: rank for rank, priority in enumerate(Priority)}


class Executor:
    """Runs what is delivered to one worker.

    Args:
        running: kept up to date with what runs.
        specs: of all tasks, by registry name; they may be replaced at any time.
        stop: set when the worker is to stop.
    """

    def __init__(
        self,
        broker: RedisStreamBroker,
        settings: WorkerSettings,
        specs: Mapping[str, TaskSpec],
        stop: asyncio.Event,
        *,
        running: set[Execution],
        dependencies: Dependencies,
        control: ControlChannel,
        keeper: LeaseKeeper,
        settler: Settler,
        dead_letters: DeadLetterStore,
        reporter: Reporter,
    ) -> None:
        self._broker = broker
        self._settings = settings
        self._specs = specs
        self._stop = stop
        self.running = running
        self._dependencies = dependencies
        self._control = control
        self._keeper = keeper
        self._settler = settler
        self._dead_letters = dead_letters
        self._reporter = reporter
        self._slot_freed, self._intake_closed = asyncio.Event(), asyncio.Event()

    async def fetch_loop(self, intake: Intake) -> None:
        """Take as much from the intake as there are free slots, until the worker is to stop."""
        while free := await self._free_slots():
            called_at = time.monotonic()
            try:
                deliveries = await retry_until_available(
                    partial(intake.next, free), "fetch tasks", stop=self._stop, passing=may_pass
                )
            except Exception:
                if not self._stop.is_set():
                    raise
                break  # stopped while the server is away
            if not self._stop.is_set():
                await self.start(deliveries, intake.reserved_after, called_at)

    async def close_intake(self, intake: Intake) -> None:
        """Hand back what is reserved and not begun, once the server gives us nothing more.

        While the server is away, that is left to others, who reclaim it from us.
        """
        try:
            await intake.close()
            async with asyncio.timeout(_RECOVER_SECONDS):
                await self._settler.drained()  # what was rejected is not held, and not to be found again
                self._hand_back(await intake.recover())
        except Exception as error:
            logger.warning("stopping without what was reserved and has not begun: %s", reason(error))
        finally:
            self._intake_closed.set()

    async def _free_slots(self) -> int:
        """Wait for a free slot, and count them; 0 when the worker is to stop."""
        while not self._stop.is_set():
            if (free := self._settings.max_concurrent_tasks - len(self.running)) > 0:
                return free
            self._slot_freed.clear()
            await _first_of(self._slot_freed, self._stop)
        return 0

    def _hand_back(self, deliveries: Sequence[Delivery]) -> None:
        """Leave to others what is not begun. What must not begin is not handed to others either."""
        for delivery in deliveries:
            message = self._decode(delivery)
            if message is not None and self._build(delivery, message) is not None:
                self._settler.add(hand_back(delivery))

    # --- the pipe ---------------------------------------------------------------------------------------

    async def start(self, deliveries: Sequence[Delivery], reserved_after: float, called_at: float) -> None:
        """Decode, build, acquire; then each runs in a task of asyncio of its own.

        One call takes the locks of all that came together. What lacks a lock is parked by the broker.

        Args:
            reserved_after: `time.monotonic`; what was cancelled after this moment may not have been marked.
            called_at: a moment before the call that reserved them.
        """
        messages = [(delivery, self._decode(delivery)) for delivery in deliveries]
        built = [self._build(delivery, message) for delivery, message in messages if message is not None]
        executions = [execution for execution in built if execution is not None]
        if not self._dependencies.deferred.isdisjoint(execution.spec.name for execution in executions):
            await self._dependencies.load(self._specs)
        for execution in await self._acquire(executions, called_at):
            if self._control.cancelled_since(reserved_after, execution.message.task_id):
                execution.cancel()
            self.running.add(execution)
            execution.running = asyncio.create_task(self.run(execution))

    async def run(self, execution: Execution) -> None:
        """Resolve, execute; and from the outcome to its settlement and report."""
        set_task_log_context(execution.message)
        outcome: Outcome | None = None
        try:
            with processing_span(execution.message, execution.delivery):
                outcome = await execution.run(self._dependencies.overrides, self._broker.redis)
                self._end(execution, outcome)
        except BaseException as error:  # not of the task: of what traces it
            if outcome is not None:
                raise
            self._end(execution, execution.failed(error))
        finally:
            self.running.discard(execution)
            self._slot_freed.set()

    def _end(self, execution: Execution, outcome: Outcome) -> None:
        try:
            settlement, dead_letter = settle(execution, outcome, self._settings)
        except BaseException as error:
            told = describe_exception(error, hide=execution.hide)["traceback"]
            logger.critical("the outcome of %s cannot be told\n%s", execution.message.task_id, told)
            settlement, dead_letter = unsettled(execution, error, self._settings)
        if isinstance(outcome, Failed):
            note_settlement(execution.message, settlement, dead_letter)
        try:
            self._reporter.ended(execution, outcome, settlement, dead_letter)
        except Exception:  # it only counts
            logger.exception("the end of %s cannot be counted", execution.message.task_id)
        self._settle(settlement, dead_letter)

    # --- decode and build -------------------------------------------------------------------------------

    def _decode(self, delivery: Delivery) -> TaskMessage | None:
        """The message; None when it is not to be executed here, which is settled then."""
        is_poison = delivery.redelivery_count >= self._settings.max_deliveries  # looked at before the decoder is
        try:
            if delivery.data is None:
                raise ValueError("the stream entry has no field `data`")
            message = TaskMessage.loadb(delivery.data, careful=is_poison)
        except NewerMessageError as error:
            self._settler.add(leave_to_newer(delivery, error))
            return None
        except ValueError as error:
            reason = DeadLetterReason.POISON if is_poison else DeadLetterReason.UNPARSABLE
            self._reject(delivery, None, reason, str(error))
            return None
        if delivery.cancelled:
            self._settler.add(cancelled(delivery, message, self._settings))
            return None
        if is_poison:
            count = delivery.redelivery_count
            detail = f"{count} workers have gone silent with it, the last one for more than three leases"
            self._reject(delivery, message, DeadLetterReason.POISON, detail)
            return None
        return message

    def _build(self, delivery: Delivery, message: TaskMessage) -> Execution | None:
        """The task of a message; None when there can be none, which is settled then."""
        spec = self._specs.get(message.task_name)
        if spec is None:
            detail = f"no task is registered as {message.task_name!r}"
            self._reject(delivery, message, DeadLetterReason.UNKNOWN_TASK, detail)
            return None
        if spec.task_class.at_most_once and delivery.redelivered:
            self._settle(*begun_before(delivery, message, spec.task_class, self._settings))
            return None
        try:
            task = spec.build(message)
            return Execution(delivery, message, spec, task, spec.locks(task))
        except BaseException as error:  # `__init__` and `execution_locks` may raise anything
            hide = partial(
                without_secrets_of,
                task_class=spec.task_class,
                args=message.task_args,
                kwargs=message.task_kwargs,
            )
            told = describe_exception(error, longest=0, hide=hide)
            self._reject(delivery, message, DeadLetterReason.ARGUMENTS, f"{told['type']}: {told['message']}")
            return None

    # --- acquire ----------------------------------------------------------------------------------------

    async def _acquire(self, executions: Sequence[Execution], called_at: float) -> Sequence[Execution]:
        """Take the locks of executions; return those that have them now, and are kept leased."""
        # After a pause, what we were given before may have been taken over: then all of it has to be asked for.
        expired = self._keeper.expired_since(called_at)
        asked = [execution for execution in executions if execution.locks or execution.delivery.granted or expired]
        refused: set[Execution] = set()
        granted_at = math.inf
        if asked:
            answers = []
            try:
                for some in in_calls(asked, len(asked), lambda each: LOCK_BYTES * len(each.locks)):
                    portion, sent_at = await self._take_locks(some)
                    answers += portion
                    granted_at = min(granted_at, sent_at)
            except Exception:
                if not self._stop.is_set():
                    raise
                return ()  # stopped while the server is away; what we reserved is reclaimed from us
            for execution, (reply, token) in zip(asked, answers, strict=True):
                if reply[0] != 1 or (execution.locks and not self._grant(execution, token)):
                    refused.add(execution)
            self._reporter.asked_for_locks(asked, [reply for reply, _ in answers])
        granted = [execution for execution in executions if execution not in refused] if refused else executions
        self._keeper.add(granted, granted_at)
        return granted

    async def _take_locks(self, asked: Sequence[Execution]) -> tuple[list[tuple[list[int], int]], float]:
        """Ask for the locks of each. What the server refuses for one of them makes it a dead letter, and no other.

        Returns:
            The reply and the fencing token of each, and the moment before they were granted (`time.monotonic`).

        Raises:
            Exception: when the worker is stopped while the server is away.
        """
        wanted = [self._start_request(execution) for execution in asked]
        granted_at = time.monotonic()

        async def start() -> tuple[list[list[int]], int]:
            nonlocal granted_at
            # After a failover the keeper may still wait for the server that was replaced.
            if self._keeper.late:
                await self._keeper.renew()
            granted_at = time.monotonic()
            return await self._broker.start(wanted, lease_seconds=self._settings.lease_seconds)

        try:
            replies, first = await retry_until_available(start, "take locks", stop=self._stop)
            return [(reply, token) for token, reply in enumerate(replies, start=first)], granted_at
        except Exception as error:
            if is_transient(error):  # we stop
                raise
            if len(asked) > 1:
                apart = [await self._take_locks([execution]) for execution in asked]
                return [answer for answers, _ in apart for answer in answers], granted_at
            [execution] = asked
            detail = f"its locks cannot be taken: {one_line(error)}"
            locks = execution.locks if can_be_packed(execution.locks) else ()
            self._reject(execution.delivery, execution.message, DeadLetterReason.ARGUMENTS, detail, locks)
            return [([-1], 0)], granted_at

    def _grant(self, execution: Execution, token: int) -> bool:
        try:
            execution.grant(token)
        except BaseException as error:  # the lock may be of a class of the author's own
            detail = f"its locks cannot be granted: {one_line(error)}"
            self._reject(
                execution.delivery, execution.message, DeadLetterReason.ARGUMENTS, detail, execution.locks
            )
            return False
        return True

    def _start_request(self, execution: Execution) -> StartRequest:
        delivery = execution.delivery
        request: StartRequest = {
            "stream": delivery.stream,
            "entry": delivery.entry,
            "deliveries": delivery.deliveries,
            "task": execution.message.task_id,
            "rank": _RANK[delivery.priority],
            "resumed": resumed_stream(delivery.stream),
            "since": delivery.since,
            "locks": execution.locks,
            "retry_ms": int(self._settings.lock_retry_seconds * 1000),
        }
        if delivery.granted is not None:
            request["granted"] = delivery.granted
        return request

    def _reject(
        self,
        delivery: Delivery,
        message: TaskMessage | None,
        reason: str,
        detail: str,
        locks: Sequence[LockSpec] = (),
    ) -> None:
        vo = None
        if message is not None:
            spec = self._specs.get(message.task_name)
            vo = vo_of(None if spec is None else spec.task_class, message)
        self._reporter.rejected(message, reason, detail, vo)
        settlement, dead_letter = reject(delivery, message, vo, reason, detail, self._settings)
        settlement.locks = locks  # it may have some of them
        self._settle(settlement, dead_letter)

    def _settle(self, settlement: Settlement, dead_letter: DeadLetter | None) -> None:
        if dead_letter is None:
            self._settler.add(settlement)
        else:
            self._dead_letters.add(dead_letter, settlement)

    # --- the end ----------------------------------------------------------------------------------------

    def tasks(self) -> list[asyncio.Task[None]]:
        """The tasks of asyncio that run executions."""
        return [execution.running for execution in self.running if execution.running is not None]

    async def flush(self) -> None:
        """Store all dead letters and send all settlements, once nothing more is taken."""
        await self._intake_closed.wait()
        await self._dead_letters.close(_DATABASE_SECONDS)
        await self._settler.drained()


async def _first_of(*events: asyncio.Event) -> None:
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
