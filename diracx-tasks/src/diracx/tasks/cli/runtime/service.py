"""Runs a worker or a scheduler until a signal: event loop, signals, readiness, reading at the start."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from ...plumbing._util.tasks import cancel_and_wait
from ...plumbing.broker import RedisStreamBroker
from ...plumbing.broker.server_check import Role
from ...plumbing.enums import Size
from ..options import LogLevelOption
from .broker import open_broker
from .configuration import Configuration, read_configuration
from .logs import set_task_log_level
from .metrics_server import LOOPBACK, MetricsHostOption, MetricsPortOption
from .server import ServerAndTasks
from .supervisor import report_to_supervisor

logger = logging.getLogger(__package__)

#: New objects before the garbage collector searches for cycles: a worker makes thousands a second that have none.
_COLLECTED_AFTER = 10_000


@dataclass(frozen=True, kw_only=True)
class ServiceOptions(ServerAndTasks):
    """The options that `worker` and `scheduler` share."""

    metrics_port: MetricsPortOption = None
    metrics_host: MetricsHostOption = LOOPBACK
    log_level: LogLevelOption = None


class Service:
    """A process that serves until a signal, or until its supervisor is gone."""

    def __init__(self, options: ServiceOptions) -> None:
        self.options = options
        self.url = options.url
        self.stop = asyncio.Event()
        self._ready: asyncio.Event | None = None
        self.on_second_signal: Callable[[], None] = lambda: None

    def is_ready(self) -> bool:
        """True if it serves, and is not about to stop."""
        return self._ready is not None and self._ready.is_set() and not self.stop.is_set()

    async def open(
        self, stack: AsyncExitStack, role: Role, size: Size | None = None
    ) -> tuple[RedisStreamBroker, Configuration]:
        """The broker, open, and the configuration of the tasks of `options.registry`.

        Raises:
            CliError: when the server cannot be used, or a module or the configuration is wrong.
        """
        broker = await stack.enter_async_context(open_broker(self.url, size, role=role))
        registry = self.options.registry
        set_task_log_level(registry)
        for line in registry.ambiguous_names():
            logger.warning("%s", line)
        return broker, read_configuration(registry)

    def announce(self, stack: AsyncExitStack, ready: asyncio.Event, line: str) -> None:
        """Log the line, and report to the supervisor, when it is ready."""

        async def announce() -> None:
            await ready.wait()
            gc.freeze()  # modules and all that was made up to here stay: the collector need not search them again
            gc.set_threshold(_COLLECTED_AFTER)
            logger.info("ready: %s", line)

        def stop_alone() -> None:
            logger.warning("the supervisor is gone: stopping")
            self.stop.set()

        self._ready = ready
        for coroutine in (announce(), report_to_supervisor(ready, stop_alone)):
            stack.push_async_callback(cancel_and_wait, asyncio.create_task(coroutine))

    def run(self, main: Callable[[AsyncExitStack], Awaitable[None]]) -> None:
        """Run until a signal comes, and stop cleanly. Errors of the start are raised."""
        with asyncio.Runner(loop_factory=_fastest_loop()) as runner:
            _run_to_its_end(runner.get_loop(), self._until_signalled(main))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # Python's own end would give up the handlers above

    async def _until_signalled(self, main: Callable[[AsyncExitStack], Awaitable[None]]) -> None:
        loop = asyncio.get_running_loop()

        def on_signal(number: int, _: object) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._on_signal, signal.Signals(number).name)

        # Not through the loop: its handlers go with it, and a late signal would then kill a process that has
        # done all its work and only ends, with an exit code of failure.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, on_signal)
        async with AsyncExitStack() as stack:
            await main(stack)
        logger.info("stopped")

    def _on_signal(self, name: str) -> None:
        if not self.stop.is_set():
            logger.info("%s: stopping; once more to cancel what runs", name)
            self.stop.set()
        else:
            logger.warning("%s again: cancelling what runs", name)
            self.on_second_signal()


def _run_to_its_end(loop: asyncio.AbstractEventLoop, main: Coroutine[Any, Any, None]) -> None:
    """Run the loop until this has ended: an event loop stops for a KeyboardInterrupt or SystemExit of anything
    that runs in it, as of an asyncio task that a task of ours has started. Signals come in another way.
    """
    running = loop.create_task(main)
    while True:
        try:
            return loop.run_until_complete(running)
        except (KeyboardInterrupt, SystemExit) as error:
            if running.done():
                raise
            logger.error(
                "a part of a task raised %s outside of `execute`; the worker goes on", type(error).__name__
            )


def _fastest_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed (`pip install diracx-tasks[fast]`); None for that of asyncio."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
