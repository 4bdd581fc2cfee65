"""`TaskSystem`: workers and a scheduler in the event loop of a test, with a real server."""

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
_POLL_SECONDS = 0.01
_IN_MEMORY = "sqlite+aiosqlite:///:memory:"


class TaskSystem:
    """Runs the given tasks, registered as `test:ClassName`, and stores their results.

    Args:
        tasks: task classes, or a mapping registry name -> class.
        redis_url: the server; None: start an embedded one.
        workers: number of workers per size of the tasks; 0: only submit.
        concurrency: slots of each worker.
        scheduler: run a scheduler (delayed tasks are promoted without one, too).
        config: a `TasksConfig` or its mapping; or a DiracX `Config`, whose section `Systems.Tasks` and VOs are
            used, and which is injected into tasks.
        overrides: replacements of dependencies, as FastAPI's `dependency_overrides`.
        task_db_url: database of dead letters, created empty; None: no database.
        vos: VOs for VO-aware tasks of the scheduler; by default those of a DiracX `config`.
        settings: additional settings of the workers (`lease_seconds`, …).

    Raises:
        BaseException: on exit, the exception that ended a worker or the scheduler.
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
        self.running_workers: list[Worker] = []
        """The workers, while the system is entered."""
        self.running_scheduler: TaskScheduler | None = None
        self._serving: list[asyncio.Task[None]] = []
        self._scheduling: list[asyncio.Task[None]] = []
        self.task_db: TaskDB | None = None
        """The database of dead letters: `async with system.task_db as db: await db.search()`."""

    def _configure(
        self, config: TasksConfig | Config | Mapping[str, Any] | None, vos: Iterable[str] | None
    ) -> None:
        if config is None or isinstance(config, TasksConfig | Mapping):
            self.config = TasksConfig.model_validate(config or {})
        else:
            self.config = load_tasks_config(config=config)
            self._diracx_config = config
            vos = sorted(config.registry) if vos is None else vos
        self._vos = list(vos or ())

    def reconfigure(
        self, config: TasksConfig | Config | Mapping[str, Any] | None, vos: Iterable[str] | None = None
    ) -> None:
        """Change the configuration. Running tasks keep their settings.

        Args:
            config: the new configuration, as of the constructor; None: that of the code.
            vos: the new VOs; by default those of a DiracX `config`, else the current ones.

        Raises:
            ValueError: the configuration is invalid; the old one stays in force.
        """
        of_diracx = not (config is None or isinstance(config, TasksConfig | Mapping))
        self._configure(config, self._vos if vos is None and not of_diracx else vos)
        for worker in self.running_workers:
            worker.reconfigure(self.config)
        if self.running_scheduler is not None:
            self.running_scheduler.reconfigure(self.config, self._vos)

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
        self._stack.enter_context(use_broker(lambda: Binding(self.broker, self.registry, self.config)))
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
                        config=self.config,
                    )
                    self.running_workers.append(worker)
                    self._serving.append(asyncio.create_task(worker.run(self._stop), name=f"worker {size}"))
                    ready.append(worker.ready)
            if self._scheduler:
                broker = self._broker()
                self._stack.push_async_callback(broker.shutdown)
                scheduler = TaskScheduler(broker, self.registry, config=self.config, vos=self._vos)
                self.running_scheduler = scheduler
                self._scheduling.append(
                    asyncio.create_task(scheduler.run(self._stop_scheduling), name="scheduler")
                )
                ready.append(scheduler.ready)
        finally:
            # Pushed last: workers are stopped before their brokers are closed.
            self._stack.push_async_callback(self._end)
        for event in ready:
            await self.unless_dead(event.wait())

    def _broker(self, size: Size = Size.MEDIUM) -> RedisStreamBroker:
        assert self.redis_url is not None
        return RedisStreamBroker(self.redis_url, worker_size=size)

    async def _open_task_db(self, url: str) -> TaskDB:
        from ..plumbing.persistence import TaskDB

        if url == _IN_MEMORY:
            # A temporary file, as transactions of an in-memory database share one connection. A thread of SQLite
            # whose caller was cancelled may still write to it during its removal.
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
        """Stop the scheduler, then the workers."""
        results: list[BaseException | None] = []
        for stop, running in ((self._stop_scheduling, self._scheduling), (self._stop, self._serving)):
            stop.set()
            results += await asyncio.gather(*running, return_exceptions=True)
            running.clear()
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def unless_dead(self, waiting: Any) -> Any:
        """Await, and raise the exception of a worker or scheduler that ends meanwhile."""
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
        result: TaskResult[Any] = await self.unless_dead(self.broker.wait_result(task_id, timeout))
        return result

    async def cancel(self, task_id: str) -> TaskPlace:
        """Cancel a task. Returns its state; its result is an error of type `TaskCancelledError`."""
        found = await self.broker.cancel([task_id], result_ttl_seconds=_RESULT_TTL_SECONDS)
        return found[task_id]

    async def drain(self, timeout: float = 30.0) -> None:
        """Wait until no task is queued, running or due; tasks that are due later do not count.

        Raises:
            TimeoutError: after `timeout` seconds; has the number of unfinished tasks by state.
        """
        deadline = time.monotonic() + timeout
        while left := await unfinished(self.broker.redis):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not drained after {timeout} s: {left}")
            await self.unless_dead(asyncio.sleep(_POLL_SECONDS))
