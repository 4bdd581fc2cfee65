"""The worker: intake → execution → settlement, as many at a time as it has slots."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Collection, Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from redis.exceptions import ResponseError

from .._util.retrying import is_transient, may_pass, reason, retry_until_available
from .._util.tasks import cancel_and_wait
from ..broker.groups import ask_for_audit, group_of
from ..broker.locking import can_be_packed
from ..broker.models import TaskMessage, id_at_head
from ..broker.sizes import LOCK_BYTES, in_calls
from ..broker.spans import set_task_log_context
from ..broker.streams import resumed_stream
from ..config import TasksConfig
from ..current import use_broker
from ..enums import Priority
from ..exceptions import NewerMessageError
from ..messages.error_info import describe_exception, one_line
from ..messages.secrets import without_secrets_of
from ..persistence.letter import DeadLetterReason
from ..registry import TaskRegistry
from ..submission.client import Binding
from ..task_vo import vo_of
from .control_channel import ControlChannel
from .dead_letters import DeadLetterStore
from .dependencies import Dependencies, Overrides
from .execution import Execution
from .intake import Intake
from .keeper import LeaseKeeper, PendingAck
from .outcome import Failed
from .promoter import Promoter
from .reporter import Reporter
from .settings import WorkerSettings
from .settlement import begun_before, cancelled, hand_back, leave_to_newer, reject, settle, unsettled
from .settler import Settler
from .spans import note_settlement, processing_span
from .task_spec import task_specs
from .watchdog import Watchdog

if TYPE_CHECKING:
    from ..base_task import BaseTask
    from ..broker import RedisStreamBroker
    from ..broker.models import Delivery, LockSpec, Settlement
    from ..injection.plan import Plan
    from ..persistence import DeadLetter, TaskDB
    from .outcome import Outcome

logger = logging.getLogger(__name__)

_RANK = {priority: rank for rank, priority in enumerate(Priority)}
#: How long a stopping worker still tries to tell the broker what ended, and cancelled tasks to end.
SHUTDOWN_FLUSH_SECONDS = 5.0
#: How much of that the database has to store dead letters, before they go to Redis.
_DATABASE_SECONDS = 2.0


class Worker:
    """Runs tasks of one size.

    Args:
        broker: carries the worker's size and name.
        registry: registry name -> task class; anything else that arrives is a dead letter.
        task_db: where dead letters are kept; without one they wait in Redis.
        overrides: replacements of dependencies, as FastAPI's `dependency_overrides`; they win over
            what the environment provides.
        config: the operator's settings of tasks.
    """

    def __init__(
        self,
        broker: RedisStreamBroker,
        registry: Mapping[str, type[BaseTask]],
        *,
        settings: WorkerSettings | None = None,
        task_db: TaskDB | None = None,
        overrides: Overrides | None = None,
        config: TasksConfig | None = None,
    ) -> None:
        self._broker = broker
        self._registry = TaskRegistry.of(registry)
        self._settings = settings or WorkerSettings()
        self._binding = Binding(broker, self._registry, config or TasksConfig())
        self._specs = task_specs(self._registry, config or TasksConfig())
        self._dependencies = Dependencies(self._specs, overrides or {})
        self._task_db = task_db
        self._running: set[Execution] = set()
        self._group_searches: set[asyncio.Task[None]] = set()
        self._slot_freed = asyncio.Event()
        self._promoter = Promoter(broker, self._settings.housekeeping_seconds)
        self._control = ControlChannel(
            broker.consumer_name, self._cancel, self._promoter.hear, self._hear_of_shorter_lease
        )
        self.reporter = Reporter(broker, self._settings, self._running)
        self._asked_at = self._fetched_at = 0.0
        self.ready = asyncio.Event()
        """Set when the worker takes tasks."""

    @property
    def plans(self) -> Sequence[Plan]:
        """What the tasks depend on, but for those that are looked at when the first of them comes."""
        return self._dependencies.plans

    @property
    def busy(self) -> int:
        """Number of slots in use."""
        return len(self._running)

    def _tasks(self) -> list[asyncio.Task[None]]:
        """Those of asyncio that run executions."""
        return [execution.running for execution in self._running if execution.running is not None]

    def cancel_running(self) -> None:
        """Cancel what runs, as the end of the grace period would."""
        for execution in self._running:
            execution.stop()

    def reconfigure(self, config: TasksConfig) -> None:
        """Go on with other settings. Call it in the worker's event loop.

        They are for what is delivered from now on: its limits are those of its next attempt to take its locks.
        What runs keeps what it began with: its time limit, its locks and its retries. What tasks submit goes to
        the queue that the new settings say.
        """
        self._specs = task_specs(self._registry, config, self._specs)
        self._binding = replace(self._binding, config=config)

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set, then let what runs end within the grace period.

        Raises:
            redis.exceptions.RedisError: when the server does not answer at the start. Later it is waited for.
        """
        lease_seconds = self._settings.lease_seconds
        self._loop = loop = asyncio.get_running_loop()
        heard = self._control
        self._keeper = keeper = LeaseKeeper(
            self._broker.url,
            self._broker.consumer_name,
            lease_seconds,
            loop,
            heard.channels,
            heard.receive,
            heard.listening,
        )
        self._intake = intake = Intake(
            self._broker, self._settings, stop, keeper.held, lambda: not self._running, keeper.held_locks
        )
        async with keeper, self._dependencies.open():
            self.reporter.dataset = lambda: keeper.epoch
            self._settler = Settler(self._broker, self._keeper, intake.settled)
            self._dead_letters = DeadLetterStore(self._broker, self._task_db, self._settler.add)
            with use_broker(lambda: self._binding):
                settling = asyncio.create_task(self._settler.run())
                storing = asyncio.create_task(self._dead_letters.run())
                promoting = asyncio.create_task(self._promoter.run())
                reporting = asyncio.create_task(self.reporter.run())
                watchdog = self._watchdog(stop)
                try:
                    await self._dead_letters.started()
                    self.ready.set()
                    await run_supervised({settling, promoting}, self._take_in(intake, stop))
                finally:
                    await self._finish()
                    watchdog.finish()
                    if watchdog.ending:  # the process ends any moment now, with an exit code of its own
                        await loop.create_future()
                    await cancel_and_wait(settling, storing, promoting, reporting)
        await self._leave()

    def _hear_of_shorter_lease(self) -> None:
        self._keeper.renew_soon()
        self._intake.look_at_once()

    def _watchdog(self, stop: asyncio.Event) -> Watchdog:
        """What says so when an execution does not end, and ends the process where that was asked for."""
        loop = asyncio.get_running_loop()
        watchdog = Watchdog(
            self._broker,
            self._settings,
            running=lambda: list(self._running),
            stop=stop,
            drained=lambda: asyncio.run_coroutine_threadsafe(self._flush(), loop),
            stop_renewing=self._keeper.stop_renewing,
            report_blocked=self.reporter.report_blocked,
        )
        watchdog.start()
        return watchdog

    # --- intake -----------------------------------------------------------------------------------------

    async def _take_in(self, intake: Intake, stop: asyncio.Event) -> None:
        while not stop.is_set():
            free = self._settings.max_concurrent_tasks - self.busy
            if free <= 0:
                self._slot_freed.clear()
                await _first_of(self._slot_freed, stop)
                continue
            called_at = time.monotonic()
            try:
                deliveries = await retry_until_available(
                    partial(intake.next, free), "fetch tasks", stop=stop, passing=may_pass
                )
            except Exception:
                if not stop.is_set():
                    raise
                break  # stopped while the server is away; what was reserved there is reclaimed from us
            self._asked_at, self._fetched_at = intake.asked_at, called_at
            if stop.is_set():
                for delivery in deliveries:
                    if self._prepare(delivery):  # what must not begin is not handed to others either
                        self._settler.add(hand_back(delivery))
                break
            await self._begin(deliveries, stop)

    async def _begin(self, deliveries: Sequence[Delivery], stop: asyncio.Event) -> None:
        """Start what may start; what lacks a lock is parked by the broker until it can be had."""
        executions = [execution for delivery in deliveries if (execution := self._prepare(delivery))]
        deferred = self._dependencies.deferred
        if deferred and any(execution.spec.name in deferred for execution in executions):
            await self._dependencies.load(self._specs)
        # After a pause, what we were given before may have been taken over: then all of it has to be asked for.
        expired = self._keeper.expired_since(self._fetched_at)
        asked = [execution for execution in executions if execution.locks or execution.delivery.woken or expired]
        refused: set[Execution] = set()
        granted_at = math.inf
        if asked:
            answers = []
            try:
                for some in in_calls(asked, len(asked), lambda each: LOCK_BYTES * len(each.locks)):
                    portion, asked_at = await self._start(some, stop)
                    answers += portion
                    granted_at = min(granted_at, asked_at)
            except Exception:
                if not stop.is_set():
                    raise
                return  # stopped while the server is away; what we reserved is reclaimed from us
            for execution, (reply, token) in zip(asked, answers, strict=True):
                if reply[0] != 1 or (execution.locks and not self._grant(execution, token)):
                    refused.add(execution)
            self.reporter.asked_for_locks(asked, [reply for reply, _ in answers])
        granted = [execution for execution in executions if execution not in refused] if refused else executions
        self._keeper.add(granted, granted_at)
        for execution in granted:
            self._spawn(execution)

    async def _start(
        self, asked: Sequence[Execution], stop: asyncio.Event
    ) -> tuple[list[tuple[list[int], int]], float]:
        """Ask for the locks of each. What the server refuses for one of them makes it a dead letter, and no other.

        Returns:
            The reply and the fencing token of each, and the moment before they were granted (`time.monotonic`).

        Raises:
            Exception: when the worker is stopped while the server is away.
        """
        wanted = [self._with_locks(execution) for execution in asked]
        granted_at = time.monotonic()

        async def start() -> tuple[list[list[int]], int]:
            nonlocal granted_at
            # After a failover the keeper may still wait for the server that was replaced.
            if self._keeper.late:
                await self._keeper.renew()
            granted_at = time.monotonic()
            return await self._broker.start(wanted, lease_seconds=self._settings.lease_seconds)

        try:
            replies, first = await retry_until_available(start, "take locks", stop=stop)
            return [(reply, token) for token, reply in enumerate(replies, start=first)], granted_at
        except Exception as error:
            if is_transient(error):  # we stop
                raise
            if len(asked) > 1:
                apart = [await self._start([execution], stop) for execution in asked]
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

    def _with_locks(self, execution: Execution) -> dict[str, Any]:
        delivery = execution.delivery
        return {
            "stream": delivery.stream,
            "entry": delivery.entry,
            "deliveries": delivery.deliveries,
            "task": execution.message.task_id,
            "rank": _RANK[delivery.priority],
            "handover": resumed_stream(delivery.stream),
            "since": delivery.since,
            "locks": execution.locks,
            "retry_ms": int(self._settings.lock_retry_seconds * 1000),
            "woken": delivery.woken,
        }

    def _prepare(self, delivery: Delivery) -> Execution | None:
        """From a delivery to something that can run, or to a dead letter."""
        convicted = delivery.deaths >= self._settings.max_deliveries  # looked at before the decoder is
        try:
            if delivery.data is None:
                raise ValueError("the stream entry has no field `data`")
            message = TaskMessage.loadb(delivery.data, careful=convicted)
        except NewerMessageError as error:
            self._settler.add(leave_to_newer(delivery, error))
            return None
        except ValueError as error:
            reason = DeadLetterReason.POISON if convicted else DeadLetterReason.UNPARSABLE
            self._reject(delivery, None, reason, str(error))
            return None
        if delivery.cancelled:
            self._settler.add(cancelled(delivery, message, self._settings))
            return None
        if convicted:
            detail = f"{delivery.deaths} workers have vanished while they had it"
            self._reject(delivery, message, DeadLetterReason.POISON, detail)
            return None
        return self._build(delivery, message)

    def _build(self, delivery: Delivery, message: TaskMessage) -> Execution | None:
        spec = self._specs.get(message.task_name)
        if spec is None:
            self._reject(
                delivery, message, DeadLetterReason.UNKNOWN_TASK, f"no task is registered as {message.task_name!r}"
            )
            return None
        if spec.task_class.at_most_once and delivery.redelivered:
            self._end(*begun_before(delivery, message, spec.task_class, self._settings))
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
            detail = f"{told['type']}: {told['message']}"
            self._reject(delivery, message, DeadLetterReason.ARGUMENTS, detail)
            return None

    def _cancel(self, task_ids: Collection[str]) -> None:
        for execution in self._running:
            if execution.message.task_id in task_ids:
                execution.cancel()

    def _reject(
        self,
        delivery: Delivery,
        message: TaskMessage | None,
        reason: str,
        detail: str,
        locks: Sequence[LockSpec] = (),
    ) -> None:
        vo = None if message is None else vo_of(self._registry.get(message.task_name), message)
        self.reporter.rejected(message, reason, detail, vo)
        settlement, letter = reject(delivery, message, vo, reason, detail, self._settings)
        settlement.locks = locks  # it may have some of them
        self._bury(settlement, letter)

    # --- execution and settlement -----------------------------------------------------------------------

    def _spawn(self, execution: Execution) -> None:
        if self._control.cancelled_since(self._asked_at, execution.message.task_id):
            # Announced after the server gave it to us, and before it was among those that run.
            execution.cancel()
        self._running.add(execution)
        execution.running = self._loop.create_task(self._run(execution))

    async def _run(self, execution: Execution) -> None:
        set_task_log_context(execution.message)
        outcome: Outcome | None = None
        try:
            with processing_span(execution.message, execution.delivery):
                outcome = await execution.run(self._dependencies.overrides)
                self._told(execution, outcome)
        except BaseException as error:  # not of the task: of what traces it
            if outcome is not None:
                raise
            self._told(execution, execution.failed(error))
        finally:
            self._running.discard(execution)
            self._slot_freed.set()

    def _told(self, execution: Execution, outcome: Outcome) -> None:
        """What follows from an outcome."""
        try:
            settlement, letter = settle(execution, outcome, self._settings)
        except BaseException as error:
            told = describe_exception(error, hide=execution.hide)["traceback"]
            logger.critical("the outcome of %s cannot be told\n%s", execution.message.task_id, told)
            settlement, letter = unsettled(execution, error, self._settings)
        if isinstance(outcome, Failed):
            note_settlement(execution.message, settlement, letter)
        try:
            self.reporter.ended(execution, outcome, settlement, letter)
        except Exception:  # it only counts
            logger.exception("the end of %s cannot be counted", execution.message.task_id)
        self._end(settlement, letter)

    def _end(self, settlement: Settlement, letter: DeadLetter | None) -> None:
        if letter is None:
            self._settler.add(settlement)
        else:
            self._bury(settlement, letter)

    def _bury(self, settlement: Settlement, letter: DeadLetter) -> None:
        self._keeper.add([PendingAck(settlement.delivery, settlement.locks)])
        if letter.task_name:
            self._dead_letters.add(letter, settlement)
            return
        search = asyncio.create_task(self._store_child(settlement, letter, id_at_head(letter.data)))
        self._group_searches.add(search)
        search.add_done_callback(self._group_searches.discard)

    async def _store_child(self, settlement: Settlement, letter: DeadLetter, child: bytes | None) -> None:
        """Store the dead letter of what cannot be read, and may be the child of a group."""
        find = (
            partial(group_of, self._broker.redis, child) if child else partial(ask_for_audit, self._broker.redis)
        )
        group: str | None = None
        try:
            group = await retry_until_available(find, "find the group of a child")
        except ResponseError as error:  # as of a key of another type: the letter must not wait for it
            logger.error("cannot look for the group of %r: %s", child, error)
        if group is not None:
            told = f"{letter.reason}: {letter.detail}"
            settlement.group = {"id": group, "child": child, "error": told.replace("\n", " ")}
        self._dead_letters.add(letter, settlement)

    # --- beginning and end ------------------------------------------------------------------------------

    async def _finish(self) -> None:
        """Let what runs end, then cancel it; tell the broker everything that can still be told."""
        if self._running:
            logger.info("stopping: %d tasks may run for another %g s", self.busy, self._settings.grace_seconds)
            await asyncio.wait(self._tasks(), timeout=self._settings.grace_seconds)
        if self._running:
            logger.warning("stopping: %d tasks are cancelled", self.busy)
            self.cancel_running()
            # With a hard limit, what ignores this ends with the process, and not before.
            patience = SHUTDOWN_FLUSH_SECONDS if self._settings.hard_limit_seconds is None else None
            await asyncio.wait(self._tasks(), timeout=patience)
        try:
            async with asyncio.timeout(SHUTDOWN_FLUSH_SECONDS):
                await self._flush()
        except TimeoutError:
            logger.warning("stopping without the last settlements: others will run these tasks again")
        for left in [*self._tasks(), *self._group_searches]:
            left.cancel()

    async def _flush(self) -> None:
        """Store all dead letters and send all settlements."""
        if self._group_searches:
            await asyncio.wait(self._group_searches)
        await self._dead_letters.close(_DATABASE_SECONDS)
        await self._settler.drained()

    async def _leave(self) -> None:
        try:
            async with asyncio.timeout(SHUTDOWN_FLUSH_SECONDS):
                await retry_until_available(self._broker.leave, "sign off")
                await self.reporter.leave()
        except Exception as error:
            logger.warning("could not sign off: %s; the lease will end by itself", reason(error))


async def _first_of(*events: asyncio.Event) -> None:
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


async def run_supervised(companions: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> None:
    """Do the work, but not a moment longer than its companions live, who never end by themselves."""
    working = asyncio.create_task(work)
    try:
        await asyncio.wait({*companions, working}, return_when=asyncio.FIRST_COMPLETED)
        for companion in companions:
            if companion.done():
                companion.result()
        await working
    finally:
        await cancel_and_wait(working)
