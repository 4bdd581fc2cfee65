"""The worker and its life cycle. The steps of a task are in `executor.py`."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from .._util.retrying import reason, retry_until_available
from .._util.tasks import cancel_and_wait, in_own_thread
from ..base_task import current_message, use_broker
from ..broker.server_check import Role
from ..broker.telemetry import task_attributes
from ..config import TasksConfig
from ..registry import TaskRegistry
from ..submission.client import Binding
from .control_channel import ControlChannel
from .dead_letters import DeadLetterStore
from .dependencies import Dependencies, Overrides
from .executor import Executor
from .intake import Intake
from .keeper import LeaseKeeper
from .promoter import Promoter
from .reporter import Reporter
from .settings import WorkerSettings
from .settler import Settler
from .task_spec import task_specs
from .unread import UnreadGuard
from .watchdog import SHUTDOWN_FLUSH_SECONDS, Watchdog

if TYPE_CHECKING:
    from ..base_task import BaseTask
    from ..broker import RedisStreamBroker
    from ..injection.plan import Plan
    from ..persistence import TaskDB
    from .execution import Execution

logger = logging.getLogger(__name__)


class Worker:
    """Runs tasks of one size.

    Args:
        broker: holds the worker's size and name.
        registry: task classes by registry name; a task with another name becomes a dead letter.
        task_db: database of dead letters; without one they wait in Redis.
        overrides: replacements of dependencies, as FastAPI's `dependency_overrides`; they take precedence over the
            environment.
        config: the operator's settings of tasks.
        task_class_registry: name of `registry` in the published interface, whose own `registry` (the functions of
            `create_task_bindings`) is ignored then. `max_concurrent_tasks` is used without `settings`;
            `max_prefetch` is ignored, as the worker fetches only for free slots.
    """

    def __init__(
        self,
        broker: RedisStreamBroker,
        registry: Mapping[str, Any] | None = None,
        task_class_registry: Mapping[str, type[BaseTask]] | None = None,
        max_concurrent_tasks: int = 10,
        max_prefetch: int = 0,
        task_db: TaskDB | None = None,
        *,
        task_registry: Mapping[str, Any] | None = None,
        settings: WorkerSettings | None = None,
        overrides: Overrides | None = None,
        config: TasksConfig | None = None,
    ) -> None:
        self._broker = broker
        classes = task_class_registry if task_class_registry is not None else registry
        if classes is None:
            raise TypeError("a Worker needs its task classes: the argument `registry`, or `task_class_registry`")
        self._registry = TaskRegistry.of(classes)
        self._settings = settings or WorkerSettings(max_concurrent_tasks=max_concurrent_tasks)
        self._binding = Binding(broker, self._registry, config or TasksConfig())
        self._specs = task_specs(self._registry, config or TasksConfig())
        self._dependencies = Dependencies(self._specs, overrides or {})
        self._task_db = task_db
        self._running: set[Execution] = set()
        self.reporter = Reporter(broker, self._settings, self._running)
        self.ready = asyncio.Event()
        """Set when the worker starts to take tasks."""

    @property
    def plans(self) -> Sequence[Plan]:
        """Injection plans of the tasks, without those that are compiled at first use."""
        return self._dependencies.plans

    def cancel_running(self) -> None:
        """Cancel all running tasks, as at the end of the grace period."""
        for execution in self._running:
            execution.stop()

    def reconfigure(self, config: TasksConfig) -> None:
        """Apply other task settings. Call it in the worker's event loop.

        They apply to deliveries from now on: a parked task gets the new limits with its next attempt to take its
        locks. Running tasks keep their time limit, locks and retries. Tasks submitted by them go to the queue of
        the new settings.
        """
        self._specs.update(task_specs(self._registry, config, self._specs))
        self._binding = replace(self._binding, config=config)

    async def listen(self, finish_event: asyncio.Event) -> None:
        """Start the broker if necessary, then `run`; the published name."""
        await self._broker.startup(Role.WORKER)
        await self.run(finish_event)

    async def run(self, stop: asyncio.Event) -> None:
        """Run tasks until `stop` is set, then let the running ones end within the grace period.

        Raises:
            redis.exceptions.RedisError: when the server does not reply at the start. Later, the worker waits for
                it.
        """
        name_tasks_in_logs()
        broker, settings, running, reporter = self._broker, self._settings, self._running, self.reporter
        loop = asyncio.get_running_loop()
        promoter = Promoter(broker, settings.housekeeping_seconds)
        control = ControlChannel(broker.consumer_name, running, promoter)
        keeper = LeaseKeeper(
            broker.url,
            broker.consumer_name,
            settings.lease_seconds,
            loop,
            control.channels,
            control.receive,
            control.listening,
        )
        unread = UnreadGuard(loop, partial(keeper.requeue_unread, broker.streams))
        intake = Intake(broker, settings, stop, keeper, running, unread)
        control.call_at_shorter_lease(keeper.renew_soon, intake.poll_now)
        async with keeper, self._dependencies.open():
            reporter.dataset = lambda: keeper.dataset_id
            settler = Settler(broker, keeper, intake)
            dead_letters = DeadLetterStore(broker, settings, self._task_db, settler, keeper)
            executor = Executor(
                broker,
                settings,
                self._specs,
                stop,
                running=running,
                dependencies=self._dependencies,
                control=control,
                keeper=keeper,
                settler=settler,
                dead_letters=dead_letters,
                reporter=reporter,
            )
            watchdog = Watchdog(broker, settings, stop, executor, keeper, reporter, unread)
            with use_broker(lambda: self._binding):
                settling, promoting = asyncio.create_task(settler.run()), asyncio.create_task(promoter.run())
                companions = {asyncio.create_task(each.run()) for each in (dead_letters, reporter)}
                watchdog.start()
                try:
                    await dead_letters.started()
                    self.ready.set()
                    await run_supervised({settling, promoting}, executor.fetch_loop(intake))
                finally:
                    await self._finish(executor, intake)
                    watchdog.finish()
                    if watchdog.ending:  # the watchdog is about to end the process, with its exit code
                        await loop.create_future()
                    await cancel_and_wait(settling, promoting, *companions)
                    await in_own_thread(unread.close)
        await self._leave()

    async def _finish(self, executor: Executor, intake: Intake) -> None:
        """End the intake, wait for running tasks, cancel the rest, then send the last settlements."""
        loop = asyncio.get_running_loop()
        grace_ends = loop.time() + self._settings.grace_seconds
        await executor.close_intake(intake)
        if self._running:
            logger.info(
                "stopping: %d tasks may run for another %g s", len(self._running), self._settings.grace_seconds
            )
            await asyncio.wait(executor.tasks(), timeout=max(0.0, grace_ends - loop.time()))
        if self._running:
            logger.warning("stopping: %d tasks are cancelled", len(self._running))
            self.cancel_running()
            # With a hard limit, the watchdog ends the process if a task ignores this.
            seconds = SHUTDOWN_FLUSH_SECONDS if self._settings.hard_limit_seconds is None else None
            await asyncio.wait(executor.tasks(), timeout=seconds)
        try:
            async with asyncio.timeout(SHUTDOWN_FLUSH_SECONDS):
                await executor.flush()
        except TimeoutError:
            logger.warning("stopping without the last settlements: other workers will run these tasks again")
        for left in executor.tasks():
            left.cancel()

    async def _leave(self) -> None:
        try:
            async with asyncio.timeout(SHUTDOWN_FLUSH_SECONDS):
                await retry_until_available(self._broker.leave, "remove the worker")
                await self.reporter.leave()
        except Exception as error:
            logger.warning("cannot remove the worker: %s; its lease will end by itself", reason(error))


@cache
def name_tasks_in_logs() -> None:
    """Add name and id of the running task to each log record of its context, from now on.

    They are put into the log context of DiracX when a record is made, because most tasks log nothing. A process
    that has not imported the logging of DiracX gets none.
    """
    make = logging.getLogRecordFactory()

    def make_named(*args: Any, **kwargs: Any) -> logging.LogRecord:
        message, logs = current_message.get(), sys.modules.get("diracx.core.logs")
        if message is not None and logs is not None:
            logs.set_log_context(**task_attributes(message))
        return make(*args, **kwargs)

    logging.setLogRecordFactory(make_named)


async def run_supervised(companions: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> None:
    """Await `work`; cancel it, and raise the error, when one of the endless `companions` ends."""
    working = asyncio.create_task(work)
    try:
        await asyncio.wait({*companions, working}, return_when=asyncio.FIRST_COMPLETED)
        for companion in companions:
            if companion.done():
                companion.result()
        await working
    finally:
        await cancel_and_wait(working)
