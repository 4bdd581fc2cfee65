"""The worker: its life cycle. What a task goes through is in `executor.py`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from .._util.retrying import reason, retry_until_available
from .._util.tasks import cancel_and_wait
from ..base_task import use_broker
from ..broker.server_check import Role
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
        broker: carries the worker's size and name.
        registry: registry name -> task class; anything else that arrives is a dead letter.
        task_db: where dead letters are kept; without one they wait in Redis.
        overrides: replacements of dependencies, as FastAPI's `dependency_overrides`; they win over
            what the environment provides.
        config: the operator's settings of tasks.
        task_class_registry: published name of `registry`, beside the functions of `create_task_bindings`, which
            are not used; `max_concurrent_tasks` is that of the settings, and nothing is fetched before it can run.
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
        """Set when the worker takes tasks."""

    @property
    def plans(self) -> Sequence[Plan]:
        """Plans of the tasks, but for those that are compiled when the first of them comes."""
        return self._dependencies.plans

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
        self._specs.update(task_specs(self._registry, config, self._specs))
        self._binding = replace(self._binding, config=config)

    async def listen(self, finish_event: asyncio.Event) -> None:
        """`run` under its published name, on a broker that may not have been started."""
        await self._broker.startup(Role.WORKER)
        await self.run(finish_event)

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set, then let what runs end within the grace period.

        Raises:
            redis.exceptions.RedisError: when the server does not answer at the start. Later it is waited for.
        """
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
        unread = UnreadGuard(loop, partial(keeper.hand_back_unread, broker.streams))
        intake = Intake(
            broker,
            settings,
            stop,
            keeper.held,
            lambda: not running,
            keeper.held_locks,
            lambda: keeper.quiet_until,
            unread,
        )
        control.call_at_shorter_lease(keeper.renew_soon, intake.look_at_once)
        async with keeper, self._dependencies.open():
            reporter.dataset = lambda: keeper.dataset_id
            settler = Settler(broker, keeper, intake)
            dead_letters = DeadLetterStore(broker, self._task_db, settler, keeper)
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
                    if watchdog.ending:  # the process ends any moment now, with an exit code of its own
                        await loop.create_future()
                    await cancel_and_wait(settling, promoting, *companions)
                    await asyncio.to_thread(unread.close)
        await self._leave()

    async def _finish(self, executor: Executor, intake: Intake) -> None:
        """Take no more, let what runs end, then cancel it; tell the broker everything that can still be told."""
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
            # With a hard limit, what ignores this ends with the process, and not before.
            seconds = SHUTDOWN_FLUSH_SECONDS if self._settings.hard_limit_seconds is None else None
            await asyncio.wait(executor.tasks(), timeout=seconds)
        try:
            async with asyncio.timeout(SHUTDOWN_FLUSH_SECONDS):
                await executor.flush()
        except TimeoutError:
            logger.warning("stopping without the last settlements: others will run these tasks again")
        for left in executor.tasks():
            left.cancel()

    async def _leave(self) -> None:
        try:
            async with asyncio.timeout(SHUTDOWN_FLUSH_SECONDS):
                await retry_until_available(self._broker.leave, "sign off")
                await self.reporter.leave()
        except Exception as error:
            logger.warning("could not sign off: %s; the lease will end by itself", reason(error))


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
