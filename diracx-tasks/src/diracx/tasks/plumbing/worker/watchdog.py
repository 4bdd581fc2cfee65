"""Executions that do not heed their cancellation: they are reported, and with a hard limit they end the process.
So are those that block the event loop.

Runs on a thread of its own, since such an execution may block the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from ..broker import worker_state
from ..broker.connection import sync_client
from ..broker.spans import task_attributes
from .blocked_loop import BlockedLoopDetector
from .dead_letters import in_redis
from .settlement import settle

if TYPE_CHECKING:
    from ..broker import RedisStreamBroker
    from .execution import Execution
    from .executor import Executor
    from .keeper import LeaseKeeper
    from .reporter import Reporter
    from .settings import WorkerSettings

logger = logging.getLogger(__name__)

#: Exit code of a worker that was ended by its hard limit.
EXIT_CODE = 70
#: How long a stopping worker still tries to tell the broker what ended, and cancelled tasks to end; and how long
#: the event loop may take to show that it is alive.
SHUTDOWN_FLUSH_SECONDS = 5.0
_LOOK_SECONDS = 0.5


class Watchdog:
    """Watches the executions of one worker.

    Args:
        stop: ends the worker's intake.
    """

    def __init__(
        self,
        broker: RedisStreamBroker,
        settings: WorkerSettings,
        stop: asyncio.Event,
        executor: Executor,
        keeper: LeaseKeeper,
        reporter: Reporter,
    ) -> None:
        self._broker = broker
        self._settings = settings
        self._limit_seconds = settings.hard_limit_seconds
        self._stop = stop
        self._executor = executor
        self._keeper = keeper
        self._reporter = reporter
        self._loop = asyncio.get_running_loop()
        self._over = threading.Event()
        self._blocked_loop = BlockedLoopDetector(
            self._loop, settings.report_blocked_seconds, executor.running, self._publish_blocked
        )
        self.ending = False
        """Whether it is about to end the process."""
        # It outlives the worker if it must: a loop does not close before its last task has ended.
        self._thread = threading.Thread(target=self._watch, name="diracx-watchdog", daemon=True)

    def _running(self) -> list[Execution]:
        return list(self._executor.running)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def finish(self) -> None:
        """End; with a hard limit, as soon as nothing runs any more."""
        self._over.set()

    def _watch(self) -> None:
        limit, report = self._limit_seconds, self._settings.report_overdue_seconds
        blocked = self._settings.report_blocked_seconds
        pause = min(_LOOK_SECONDS, report / 4, blocked / 4, *([limit / 4] if limit is not None else []))
        reported: set[Execution] = set()
        suspected: list[Execution] = []
        while not self._over.is_set() or (limit is not None and self._running()):
            if limit is not None:
                # Seen twice, or a process that was paused beyond its limits would end before it could heed them.
                seen_before, suspected = suspected, self._unresponsive(limit)
                if unresponsive := [execution for execution in suspected if execution in seen_before]:
                    self._end(unresponsive, limit)
            late = set(self._unresponsive(report))
            for execution in late - reported:
                self._report(execution, report, "it is cancelled once more, and its slot is lost until it ends")
                self._loop.call_soon_threadsafe(execution.cancel_again)
            reported = late
            self._blocked_loop.check()
            time.sleep(pause)

    def _publish_blocked(self, blocked: dict[str, Any] | None) -> None:
        with sync_client(self._broker.url, socket_timeout=2.0, socket_connect_timeout=2.0) as redis:
            self._reporter.report_blocked(redis, blocked)

    def _unresponsive(self, seconds: float) -> list[Execution]:
        """Those that should have ended longer ago than that."""
        earliest = time.monotonic() - seconds
        return [e for e in self._running() if (since := e.should_have_ended_at()) is not None and since < earliest]

    def _report(self, execution: Execution, seconds: float, then: str) -> None:
        which = task_attributes(execution.message)
        logger.error(
            "%s %s ignores its cancellation for more than %g s: %s", *which.values(), seconds, then, extra=which
        )

    def _end(self, unresponsive: list[Execution], limit: float) -> None:
        self.ending = True
        for execution in unresponsive:
            self._report(execution, limit, f"the process ends with exit code {EXIT_CODE}")
        try:
            self._let_others_end(limit)
            self._settle({*unresponsive, *self._unresponsive(limit)})
        except Exception as error:
            logger.error("ending without the last settlements (%s): others will run these tasks again", error)
        finally:
            os._exit(EXIT_CODE)

    def _let_others_end(self, limit: float) -> None:
        """The other tasks have the grace period, unless the event loop is blocked and they cannot go on."""
        self._loop.call_soon_threadsafe(self._stop.set)
        answered = threading.Event()
        self._loop.call_soon_threadsafe(answered.set)
        if not answered.wait(SHUTDOWN_FLUSH_SECONDS):
            logger.warning("the event loop is blocked: what else runs is cut off, and runs again elsewhere")
            return
        deadline = time.monotonic() + self._settings.grace_seconds
        while time.monotonic() < deadline and len(self._running()) > len(self._unresponsive(limit)):
            time.sleep(0.05)
        asyncio.run_coroutine_threadsafe(self._executor.flush(), self._loop).result(SHUTDOWN_FLUSH_SECONDS)

    def _settle(self, unresponsive: Collection[Execution]) -> None:
        """What did not end has failed, by its policy. Last of all: its locks go with it."""
        settlements = []
        for execution in unresponsive:
            outcome = execution.abandoned_outcome()
            if outcome is None:
                continue  # not ours any more
            settlement, letter = settle(execution, outcome, self._settings)
            if letter is not None:  # a database needs the event loop: it waits for the next worker that has one
                settlement.dead = in_redis(letter)
            settlements.append(settlement)
        self._keeper.stop_renewing()
        with sync_client(
            self._broker.url, protocol=2, socket_timeout=SHUTDOWN_FLUSH_SECONDS, socket_connect_timeout=2.0
        ) as redis:
            worker = self._broker.consumer_name
            worker_state.settle_now(redis, worker, settlements)
            worker_state.leave_now(redis, worker)
