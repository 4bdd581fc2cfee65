"""Executor: decodes, runs and settles the deliveries of a worker. Its methods follow the steps of a task."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from .._util.retrying import Outage, may_pass, reason
from ..broker.labels import COMPLETION_LABELS
from ..broker.models import Settlement, TaskMessage
from ..broker.telemetry import is_traced
from ..exceptions import NewerMessageError
from ..messages.arguments import rebuild
from ..messages.error_info import describe_exception
from ..messages.secrets import without_secrets_of
from ..persistence.dead_letter import DeadLetterReason
from ..task_vo import vo_of
from .acquire import LockAcquirer
from .execution import Execution, Failed, Succeeded, execution_span, note_settlement, processing_span
from .settlement import cancelled, defer_to_newer_worker, possibly_started, reject, requeue, settle

if TYPE_CHECKING:
    from ..broker import RedisStreamBroker
    from ..broker.models import Delivery
    from ..broker.requests import LockSpec
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

#: Time for the database to store dead letters when the worker stops, before they go to Redis.
_DATABASE_SECONDS = 2.0
#: Timeout of a stopping worker's call for reserved deliveries that it has not started.
_REQUEUE_SECONDS = 2.0


class Executor:
    """Runs the deliveries of one worker.

    Args:
        running: the running executions; kept up to date here.
        specs: specs of all tasks by registry name; may be replaced at any time.
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
        self._acquirer = LockAcquirer(
            broker, settings, stop, keeper=keeper, reporter=reporter, reject=self._reject_locks
        )
        self._slot_freed, self._intake_closed = asyncio.Event(), asyncio.Event()

    async def fetch_loop(self, intake: Intake) -> None:
        """Take as many deliveries from the intake as there are free slots, until the worker is to stop."""
        outage = Outage("fetch tasks")
        while free := await self._free_slots():
            called_at = intake.reserves_since()
            try:
                deliveries = await intake.next(free, self._settler)
            except Exception as error:
                if self._stop.is_set():
                    break  # stopped while the server is unavailable
                if not may_pass(error):
                    raise
                await asyncio.sleep(outage.failed(reason(error)))
                continue
            if outage.since is not None:
                outage.over()
            if not self._stop.is_set():
                await self.start(deliveries, intake.reserved_after, called_at)
                if intake.fetches_ahead:
                    await asyncio.sleep(0)  # short tasks end now, and free their slots for the next fetch

    async def close_intake(self, intake: Intake) -> None:
        """End the intake, then requeue reserved deliveries that have not started.

        While the server is unavailable they stay reserved, and other workers reclaim them when the lease expires.
        """
        try:
            await intake.close()
            async with asyncio.timeout(_REQUEUE_SECONDS):
                # Rejected deliveries are not held, so they would be returned until they are settled.
                await self._settler.drained()
                self._requeue(await intake.fetch_unacknowledged())
        except Exception as error:
            logger.warning("stopping without handing back reserved tasks that have not started: %s", reason(error))
        finally:
            self._intake_closed.set()

    async def _free_slots(self) -> int:
        """Wait for a free slot, and return the number of them; 0 when the worker is to stop."""
        while not self._stop.is_set():
            if (free := self._settings.max_concurrent_tasks - len(self.running)) > 0:
                return free
            self._slot_freed.clear()
            await _first_of(self._slot_freed, self._stop)
        return 0

    def _requeue(self, deliveries: Sequence[Delivery]) -> None:
        """Requeue deliveries that have not started, and settle those that cannot be executed at all."""
        for delivery in deliveries:
            message = self._decode(delivery)
            if message is not None and self._build(delivery, message) is not None:
                self._settler.add(requeue(delivery))

    # --- start and run ----------------------------------------------------------------------------------

    async def start(self, deliveries: Sequence[Delivery], reserved_after: float, called_at: float) -> None:
        """Decode, build and take locks, then run each execution in an asyncio task of its own.

        One call takes the locks of all deliveries. The broker parks a task whose lock is not granted.

        Args:
            reserved_after: time (`time.monotonic`) after which a cancellation may not be marked in the deliveries.
            called_at: time (`time.monotonic`) before the call that reserved the deliveries.
        """
        executions = [
            execution
            for delivery in deliveries
            if (message := self._decode(delivery)) and (execution := self._build(delivery, message))
        ]
        deferred = self._dependencies.deferred
        if deferred and not deferred.isdisjoint(execution.spec.name for execution in executions):
            await self._dependencies.load(self._specs)
        announced, create_task = self._control.announced, asyncio.get_running_loop().create_task
        traced = is_traced()
        for execution in await self._acquire(executions, called_at):
            if announced and self._control.cancelled_since(reserved_after, execution.message.task_id):
                execution.cancel()
            self.running.add(execution)
            execution.running = create_task(self.run(execution, traced))

    async def _acquire(self, executions: Sequence[Execution], called_at: float) -> Sequence[Execution]:
        """Take the locks of executions; return the granted ones, which are kept leased from now on."""
        # After an expired lease, other workers may have taken deliveries over: then every one is checked.
        expired = self._keeper.expired_since(called_at)
        granted_at = math.inf
        if requested := [each for each in executions if each.locks or each.delivery.granted or expired]:
            try:
                refused, granted_at = await self._acquirer.take(requested)
            except Exception:
                if not self._stop.is_set():
                    raise
                return ()  # stopped while the server is unavailable; other workers reclaim the deliveries
            executions = [execution for execution in executions if execution not in refused]
        self._keeper.add(executions, granted_at)
        return executions

    async def run(self, execution: Execution, traced: bool) -> None:
        """Run the execution, then settle and report its outcome."""
        try:
            if traced:
                await self._run_traced(execution)
            else:
                self._end(execution, await execution.run(self._dependencies.overrides, self._broker.redis))
        finally:
            self.running.discard(execution)
            self._slot_freed.set()

    async def _run_traced(self, execution: Execution) -> None:
        message, delivery = execution.message, execution.delivery
        outcome: Outcome | None = None
        try:
            with processing_span(message, delivery):
                with execution_span(message, delivery.stream) as ended:
                    result = await execution.run(self._dependencies.overrides, self._broker.redis)
                    ended(result)
                outcome = result
                self._end(execution, outcome)
        except BaseException as error:  # of the tracing: an execution never raises
            if outcome is not None:
                raise
            self._end(execution, execution.failed(error))

    def _end(self, execution: Execution, outcome: Outcome) -> None:
        message = execution.message
        # The task may have replaced its labels by anything.
        stores_nothing = self._settings.result_ttl_seconds is None and (
            type(message.labels) is dict and COMPLETION_LABELS.isdisjoint(message.labels)
        )
        if stores_nothing and isinstance(outcome, Succeeded):  # the usual case
            settlement = Settlement(execution.delivery, execution.locks)
        else:
            settlement = settle(execution, outcome, self._settings)
        try:
            if isinstance(outcome, Failed):
                note_settlement(message, settlement)
            self._reporter.ended(execution, outcome, settlement)
        except Exception:  # only telemetry is lost
            logger.exception("the outcome of %s cannot be counted", message.task_id)
        self._settle(settlement)

    # --- decode and build -------------------------------------------------------------------------------

    def _decode(self, delivery: Delivery) -> TaskMessage | None:
        """Decode the message; when it must not be executed here, settle the delivery and return None."""
        is_poison = (
            delivery.redelivery_count >= self._settings.max_deliveries
        )  # first: the decoder may be the cause
        try:
            if delivery.data is None:
                raise ValueError("the stream entry has no field `data`")
            message = TaskMessage.loadb(delivery.data, careful=is_poison)
        except NewerMessageError as error:
            self._settler.add(defer_to_newer_worker(delivery, error))
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
            detail = f"{count} workers stopped renewing while they ran it, the last one for more than three leases"
            self._reject(delivery, message, DeadLetterReason.POISON, detail)
            return None
        return message

    def _build(self, delivery: Delivery, message: TaskMessage) -> Execution | None:
        """Build the execution of a message; when that is impossible, settle the delivery and return None."""
        spec = self._specs.get(message.task_name)
        if spec is None:
            detail = f"no task is registered as {message.task_name!r}"
            self._reject(delivery, message, DeadLetterReason.UNKNOWN_TASK, detail)
            return None
        if spec.task_class.at_most_once and delivery.redelivered:
            self._settle(possibly_started(delivery, message, spec.task_class, self._settings))
            return None
        try:
            task = rebuild(spec.task_class, message.task_args, message.task_kwargs, message.sig)
            return Execution(delivery, message, spec, task, spec.locks(task) if spec.may_have_locks else ())
        except BaseException as error:  # `__init__` and `execution_locks` may raise anything
            hide = partial(
                without_secrets_of,
                task_class=spec.task_class,
                args=message.task_args,
                kwargs=message.task_kwargs,
            )
            error_info = describe_exception(error, longest=0, hide=hide)
            self._reject(
                delivery, message, DeadLetterReason.ARGUMENTS, f"{error_info['type']}: {error_info['message']}"
            )
            return None

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
        settlement = reject(delivery, message, vo, reason, detail, self._settings)
        settlement.locks = locks  # some of them may be granted
        self._settle(settlement)

    def _reject_locks(self, execution: Execution, detail: str, locks: Sequence[LockSpec]) -> None:
        self._reject(execution.delivery, execution.message, DeadLetterReason.ARGUMENTS, detail, locks)

    def _settle(self, settlement: Settlement) -> None:
        (self._settler if settlement.dead is None else self._dead_letters).add(settlement)

    # --- shutdown ---------------------------------------------------------------------------------------

    def tasks(self) -> list[asyncio.Task[None]]:
        """The asyncio tasks that run executions."""
        return [execution.running for execution in self.running if execution.running is not None]

    async def flush(self) -> None:
        """Wait for the end of the intake, then store all dead letters and send all settlements."""
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
