"""`TaskSystem`: workers and a scheduler in the event loop of the test, against a real server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self

from ..plumbing.base_task import BaseTask, use_broker
from ..plumbing.broker import RedisStreamBroker
from ..plumbing.broker.inspection import unfinished
from ..plumbing.broker.models import TaskResult
from ..plumbing.config import TasksConfig, load_tasks_config
from ..plumbing.enums import Size
from ..plumbing.registry import TaskRegistry
from ..plumbing.scheduler import TaskScheduler
from ..plumbing.submission.client import Binding
from ..plumbing.worker import Worker
from ..plumbing.worker.settings import WorkerSettings
from .server import embedded_redis

if TYPE_CHECKING:
    from diracx.core.config import Config

    from ..plumbing.broker.cancel import TaskPlace
    from ..plumbing.persistence import TaskDB

_RESULT_TTL_SECONDS = 3600
_LOOK_SECONDS = 0.01
_IN_MEMORY = "sqlite+aiosqlite:///:memory:"


class TaskSystem:
    """Runs the given tasks, registered as `test:ClassName`, and keeps their results.

    Args:
        tasks: task classes, or a mapping registry name -> class.
        redis_url: a server that may be used; None starts an embedded one.
        workers: number of workers for each size that the tasks have; 0 only submits.
        concurrency: slots of each worker.
        scheduler: whether a scheduler runs (delayed tasks are promoted without one, too).
        config: a `TasksConfig`, or the mapping to make it from; or a whole DiracX `Config`, whose section
            `Systems.Tasks` and registry of VOs are then used, and which tasks get injected.
        overrides: replacements of dependencies, as FastAPI's `dependency_overrides`.
        task_db_url: database of dead letters, created empty; None for none.
        vos: VOs of which the scheduler starts VO-aware tasks; by default those of a DiracX `config`.
        settings: further settings of the workers (`lease_seconds`, …).

    Raises:
        BaseException: on exit, what a worker or the scheduler died of.
    """

    def __init__(
        self,
        tasks: Iterable[type[BaseTask]] | Mapping[str, type[BaseTask]] = (),
        *,
        redis_url: str | None = None,
        workers: int = 2,
        concurrency: int = 10,
        scheduler: bool = True,
        config: TasksConfig | Config | Mapping[str, Any] | None = None,
        overrides: Mapping[Callable[..., Any], Callable[..., Any]] | None = None,
        task_db_url: str | None = _IN_MEMORY,
        vos: Iterable[str] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        named = tasks if isinstance(tasks, Mapping) else {f"test:{task.__name__}": task for task in tasks}
        self.registry = TaskRegistry.of(named)
        self.redis_url = redis_url
        self._workers = workers
        self._scheduler = scheduler
        self._overrides = dict(overrides or {})
        self._diracx_config: Config | None = None
        self._configure(config, vos)
        if self._diracx_config is not None:
            from diracx.core.config import ConfigSource

            self._overrides.setdefault(ConfigSource.create, lambda: self._diracx_config)
        self._task_db_url = task_db_url
        self._settings = WorkerSettings.model_validate(
            {
                "max_concurrent_tasks": concurrency,
                "result_ttl_seconds": _RESULT_TTL_SECONDS,
                "housekeeping_seconds": 0.2,
                "grace_seconds": 5.0,
                **(settings or {}),
            }
        )
        self._workers_up: list[Worker] = []
        self._scheduler_up: TaskScheduler | None = None
        self._serving: list[asyncio.Task[None]] = []
        self._scheduling: list[asyncio.Task[None]] = []
        self.task_db: TaskDB | None = None
        """The database of dead letters: `async with system.task_db as db: await db.search()`."""

    def _configure(
        self, config: TasksConfig | Config | Mapping[str, Any] | None, vos: Iterable[str] | None
    ) -> None:
        if config is None:
            self._config = TasksConfig()
        elif isinstance(config, TasksConfig):
            self._config = config
        elif isinstance(config, Mapping):
            self._config = TasksConfig.model_validate(config)
        else:
            self._config = load_tasks_config(config=config)
            self._diracx_config = config
            vos = sorted(config.registry) if vos is None else vos
        self._vos = list(vos or ())

    def reconfigure(
        self, config: TasksConfig | Config | Mapping[str, Any] | None, vos: Iterable[str] | None = None
    ) -> None:
        """Go on with another configuration, as an installation does when it is changed there.

        What runs keeps what it began with; what is delivered or submitted from now on follows the new settings.

        Args:
            config: as at the start, and whole: None is that of the code.
            vos: the VOs from now on; by default those of a DiracX `config`, else those that there are.

        Raises:
            ValueError: when it is no valid configuration; the old one stays.
        """
        of_diracx = not (config is None or isinstance(config, TasksConfig | Mapping))
        self._configure(config, self._vos if vos is None and not of_diracx else vos)
        for worker in self._workers_up:
            worker.reconfigure(self._config)
        if self._scheduler_up is not None:
            self._scheduler_up.reconfigure(self._config, self._vos)

    async def __aenter__(self) -> Self:
        self._stack = AsyncExitStack()
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def _start(self) -> None:
        if self.redis_url is None:
            self.redis_url = self._stack.enter_context(embedded_redis())
        self.broker = self._broker()
        self._stack.push_async_callback(self.broker.shutdown)
        await self.broker.startup()
        self._stack.enter_context(use_broker(lambda: Binding(self.broker, self.registry, self._config)))
        if self._task_db_url is not None:
            self.task_db = await self._open_task_db(self._task_db_url)
        self._stop = asyncio.Event()
        self._stop_scheduling = asyncio.Event()
        ready = []
        try:
            for size in sorted({task.size for task in self.registry.values()}):
                for _ in range(self._workers):
                    broker = self._broker(size)
                    self._stack.push_async_callback(broker.shutdown)
                    worker = Worker(
                        broker,
                        self.registry,
                        settings=self._settings,
                        task_db=self.task_db,
                        overrides=self._overrides,
                        config=self._config,
                    )
                    self._workers_up.append(worker)
                    self._serving.append(asyncio.create_task(worker.run(self._stop), name=f"worker {size}"))
                    ready.append(worker.ready)
            if self._scheduler:
                broker = self._broker()
                self._stack.push_async_callback(broker.shutdown)
                scheduler = TaskScheduler(broker, self.registry, config=self._config, vos=self._vos)
                self._scheduler_up = scheduler
                self._scheduling.append(
                    asyncio.create_task(scheduler.run(self._stop_scheduling), name="scheduler")
                )
                ready.append(scheduler.ready)
        finally:
            # Stopping comes before closing the brokers that are stopped with.
            self._stack.push_async_callback(self._end)
        for event in ready:
            await self._unless_dead(event.wait())

    def _broker(self, size: Size = Size.MEDIUM) -> RedisStreamBroker:
        assert self.redis_url is not None
        return RedisStreamBroker(self.redis_url, worker_size=size)

    async def _open_task_db(self, url: str) -> TaskDB:
        from ..plumbing.persistence import TaskDB

        if url == _IN_MEMORY:
            # All users of an in-memory database share one connection, so the end of one transaction would
            # undo what another has not committed yet. A file that goes with the system keeps them apart.
            # A thread of SQLite whose caller was cancelled may still write there while it goes.
            directory = self._stack.enter_context(
                TemporaryDirectory(prefix="diracx-taskdb-", ignore_cleanup_errors=True)
            )
            url = f"sqlite+aiosqlite:///{directory}/taskdb.sqlite"
        task_db = TaskDB(url)
        await self._stack.enter_async_context(task_db.engine_context())
        async with task_db.engine.begin() as connection:
            await connection.run_sync(task_db.metadata.create_all)
        return task_db

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _end(self) -> None:
        """The scheduler first, so that nothing is submitted that nobody will run."""
        ends: list[BaseException | None] = []
        for stop, running in ((self._stop_scheduling, self._scheduling), (self._stop, self._serving)):
            stop.set()
            ends += await asyncio.gather(*running, return_exceptions=True)
            running.clear()
        for end in ends:
            if isinstance(end, BaseException):
                raise end

    async def _unless_dead(self, waiting: Any) -> Any:
        """Wait, but not for something that a dead worker will never do."""
        waits = asyncio.ensure_future(waiting)
        done, _ = await asyncio.wait(
            {waits, *self._serving, *self._scheduling}, return_when=asyncio.FIRST_COMPLETED
        )
        if waits in done:
            return waits.result()
        waits.cancel()
        for ended in done:
            ended.result()
        raise RuntimeError(f"{next(iter(done)).get_name()} ended early")

    async def result(self, task_id: str, timeout: float = 30.0) -> TaskResult[Any]:
        """Wait for the result of a task.

        Raises:
            TimeoutError: after `timeout` seconds.
        """
        result: TaskResult[Any] = await self._unless_dead(self.broker.wait_result(task_id, timeout))
        return result

    async def cancel(self, task_id: str) -> TaskPlace:
        """Cancel a task. Returns where it was; its result is an error of type `TaskCancelledError`."""
        found = await self.broker.cancel([task_id], result_ttl_seconds=_RESULT_TTL_SECONDS)
        return found[task_id]

    async def drain(self, timeout: float = 30.0) -> None:
        """Wait until nothing is queued, running or due. Tasks of the future do not count.

        Raises:
            TimeoutError: after `timeout` seconds, saying what is left.
        """
        deadline = time.monotonic() + timeout
        while left := await self._left():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not drained after {timeout} s: {left}")
            await self._unless_dead(asyncio.sleep(_LOOK_SECONDS))

    async def _left(self) -> dict[str, int]:
        """Count what keeps the system from being drained, by place, all at one instant."""
        return await unfinished(self.broker.redis)
