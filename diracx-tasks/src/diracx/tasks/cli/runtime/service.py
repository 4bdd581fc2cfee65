"""Runs a worker or a scheduler until a signal: event loop, signal handlers, readiness, metrics, configuration."""

from __future__ import annotations

import asyncio
import atexit
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, TypeVar

import typer

from ...operations.metrics_server import Collect, serve_metrics
from ...plumbing._util.tasks import cancel_and_wait, in_own_thread
from ...plumbing.broker import RedisStreamBroker
from ...plumbing.broker.server_check import Role
from ...plumbing.broker.telemetry import is_collected
from ...plumbing.config import TasksConfig, unknown_names
from ...plumbing.config.watcher import ConfigWatcher
from ...plumbing.enums import Size
from ...plumbing.scheduler import TaskScheduler
from ...plumbing.worker import Worker
from ..errors import CliError
from ..options import LogLevelOption
from .configuration import Configuration, read_configuration
from .logs import set_task_log_level
from .server import ServerAndTasks, open_broker
from .supervisor import own_number, report_to_supervisor

logger = logging.getLogger(__package__)

_Resource = TypeVar("_Resource")
#: Threshold of the garbage collector: a worker makes thousands of objects without cycles per second.
_COLLECTED_AFTER = 10_000
#: Maximum time from the end of a worker or scheduler to that of its process.
_EXIT_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class ServiceOptions(ServerAndTasks):
    """Options of `worker` and `scheduler`."""

    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            help="Port for /metrics, /healthz and /readyz; with `worker --processes`, the next ports, too.",
        ),
    ] = None
    metrics_host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address of the metrics port; 0.0.0.0 for all.")
    ] = "127.0.0.1"
    log_level: LogLevelOption = None


class Service:
    """Service process that runs until a signal, or until its supervisor ends."""

    def __init__(self, options: ServiceOptions) -> None:
        self.options = options
        self.url = options.url
        self.stop = asyncio.Event()
        self._stack = AsyncExitStack()
        self.on_second_signal: Callable[[], None] = lambda: None

    async def enter(self, resource: AbstractAsyncContextManager[_Resource]) -> _Resource:
        """Open a resource until the process stops."""
        return await self._stack.enter_async_context(resource)

    async def open(self, role: Role, size: Size | None = None) -> tuple[RedisStreamBroker, Configuration]:
        """Open the broker, and read the configuration of the tasks of `options.registry`."""
        broker = await self.enter(open_broker(self.url, size, role=role))
        registry = self.options.registry
        set_task_log_level(registry)
        for line in registry.ambiguous_names():
            logger.warning("%s", line)
        return broker, read_configuration(registry)

    async def serve(
        self,
        serving: Worker | TaskScheduler,
        broker: RedisStreamBroker,
        config: Configuration,
        *,
        role: str,
        line: str,
        collect: Collect,
        reconfigure: Callable[[TasksConfig, tuple[str, ...] | None], None],
        alerts: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        """Run a worker or scheduler until a signal.

        Args:
            role: its role, for `config in-force`.
            line: logged when it is ready.
            collect: returns its metrics.
            reconfigure: called with settings and VOs when they have changed.
            alerts: returns the names of the alerts that `/readyz` lists.
        """
        self._announce(serving.ready, line)
        if (port := self.options.metrics_port) is not None:

            def is_ready() -> bool:
                return serving.ready.is_set() and not self.stop.is_set()

            host, port = self.options.metrics_host, port + (own_number() or 1) - 1
            try:
                await self.enter(serve_metrics(host, port, is_ready, collect, alerts))
            except OSError as error:
                why = error.strerror or error
                raise CliError(
                    f"cannot serve metrics on {host}:{port}: {why}; choose another --metrics-port"
                ) from error
        if is_collected():
            from ...operations.otel import exported

            reporter = serving.reporter if isinstance(serving, Worker) else None
            await self.enter(exported(collect, reporter))
        watcher = ConfigWatcher(
            config.reader,
            config.tasks,
            config.vos,
            reconfigure,
            role=role,
            redis=broker.redis,
            process=broker.consumer_name,
            warn=lambda tasks, vos: unknown_names(tasks, self.options.registry.keys(), vos),
        )
        await self.enter(watcher)
        await serving.run(self.stop)

    def _announce(self, ready: asyncio.Event, line: str) -> None:
        """Log the line, and report to the supervisor, once `ready` is set."""

        async def announce() -> None:
            await ready.wait()
            gc.freeze()  # modules and other objects made up to here are never garbage
            gc.set_threshold(_COLLECTED_AFTER)
            logger.info("ready: %s", line)

        def stop_alone() -> None:
            logger.warning("the supervisor has ended: stopping")
            self.stop.set()

        for coroutine in (announce(), report_to_supervisor(ready, stop_alone)):
            self.run_meanwhile(coroutine)

    def run_meanwhile(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine until the process stops, which may be at any time."""
        self._stack.push_async_callback(cancel_and_wait, asyncio.create_task(coroutine))

    def run(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run until a signal, and stop cleanly. Errors of the start are raised."""
        code = 1
        with asyncio.Runner(loop_factory=_fastest_loop()) as runner:
            loop = runner.get_loop()
            try:
                _run_until_complete(loop, self._until_signalled(main))
                code = 0
            finally:
                # Calls of cancelled tasks may go on in threads, for which the loop and then Python would wait.
                loop.set_default_executor(ThreadPoolExecutor(1))
                end = threading.Timer(_EXIT_SECONDS, _exit_without_threads, [code])
                end.daemon = True
                end.start()
                atexit.register(end.cancel)  # the first exit handler to run: no thread is waited for any more
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # Python restores the default handlers at its exit

    async def _until_signalled(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        loop = asyncio.get_running_loop()

        def on_signal(number: int, _: object) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._on_signal, signal.Signals(number).name)

        # Not handlers of the loop: these end with it, and a late signal would kill the exiting process.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, on_signal)
        async with self._stack:
            await main()
        logger.info("stopped")

    def _on_signal(self, name: str) -> None:
        if not self.stop.is_set():
            logger.info("%s: stopping; another signal cancels running tasks", name)
            self.stop.set()
        else:
            logger.warning("%s again: cancelling running tasks", name)
            self.on_second_signal()


def _exit_without_threads(code: int) -> None:
    """End the process without waiting for threads, but with its exit handlers, which flush telemetry."""
    logger.warning("code of tasks still runs %g s after the end: the process ends without it", _EXIT_SECONDS)
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
    finally:
        os._exit(code)


def _run_until_complete(loop: asyncio.AbstractEventLoop, main: Coroutine[Any, Any, None]) -> None:
    """Run the loop until `main` ends, even if code of a task stops it, by an exception or `loop.stop()`."""
    running = loop.create_task(main)
    while True:
        try:
            return loop.run_until_complete(running)
        except (KeyboardInterrupt, SystemExit, RuntimeError) as error:  # RuntimeError: by `loop.stop()`
            if running.done() or loop.is_closed():
                raise
            logger.error(
                "code of a task raised %s outside of `execute`; the worker continues", type(error).__name__
            )


def _fastest_loop() -> Callable[[], asyncio.AbstractEventLoop]:
    """Return the factory of uvloop if it is installed (`pip install diracx-tasks[fast]`), else that of asyncio."""
    try:
        import uvloop
    except ImportError:
        return _Loop
    return uvloop.new_event_loop


class _Loop(asyncio.SelectorEventLoop):
    """Event loop of asyncio that resolves host names though tasks occupy all of its threads, as uvloop does."""

    async def getaddrinfo(self, host: Any, port: Any, **options: int) -> Any:
        """Resolve a host name."""
        return await in_own_thread(partial(socket.getaddrinfo, host, port, **options))
