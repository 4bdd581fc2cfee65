"""Reports executions that ignore their cancellation or block the event loop; with a hard limit, ends the process.

Runs in a thread of its own, since such an execution may block the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from .._util.passwords import mask
from ..broker import worker_state
from ..broker.connection import sync_client
from ..broker.telemetry import task_attributes
from .settlement import settle

if TYPE_CHECKING:
    from ..broker import RedisStreamBroker
    from .execution import Execution
    from .executor import Executor
    from .keeper import LeaseKeeper
    from .reporter import Reporter
    from .settings import WorkerSettings
    from .unread import UnreadGuard

logger = logging.getLogger(__name__)

#: Exit code of a worker that was ended by its hard limit.
EXIT_CODE = 70
#: Timeout of a stopping worker for its last settlements, for the end of cancelled tasks, and for a callback in the
#: event loop that shows that the loop is not blocked.
SHUTDOWN_FLUSH_SECONDS = 5.0
#: The same for a worker that ends because a task goes on although another worker may hold its lock.
_URGENT_FLUSH_SECONDS = 0.5
_POLL_SECONDS = 0.5
_PUBLISH_SECONDS = 5.0
_LONGEST_STACK = 4_000


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
        unread: UnreadGuard,
    ) -> None:
        self._broker = broker
        self._settings = settings
        self._limit_seconds = settings.hard_limit_seconds
        self._stop = stop
        self._executor = executor
        self._keeper = keeper
        self._reporter = reporter
        self._unread = unread
        self._loop = asyncio.get_running_loop()
        self._over = threading.Event()
        self._blocked_loop = BlockedLoopDetector(
            self._loop, settings.report_blocked_seconds, executor.running, self._publish_blocked
        )
        self.ending = False
        """True if it is about to end the process."""
        # May outlive the worker: an event loop does not close before its last task has ended.
        self._thread = threading.Thread(target=self._watch, name="diracx-watchdog", daemon=True)

    def _running(self) -> list[Execution]:
        return list(self._executor.running)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def finish(self) -> None:
        """End the thread; with a hard limit, once no execution runs."""
        self._over.set()

    def _watch(self) -> None:
        limit, report = self._limit_seconds, self._settings.report_overdue_seconds
        blocked = self._settings.report_blocked_seconds
        pause = min(_POLL_SECONDS, report / 4, blocked / 4, *([limit / 4] if limit is not None else []))
        reported: set[Execution] = set()
        suspected: list[Execution] = []
        while not self._over.is_set() or (limit is not None and self._running()):
            if limit is not None:
                # Found in two checks: after a pause of the whole process, executions need time to react.
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
        """Executions that should have ended more than `seconds` ago."""
        earliest = time.monotonic() - seconds
        return [e for e in self._running() if (since := e.should_have_ended_at()) is not None and since < earliest]

    def _report(self, execution: Execution, seconds: float, consequence: str) -> None:
        attributes = task_attributes(execution.message)
        logger.error(
            "%s %s ignores its cancellation for more than %g s: %s",
            *(*attributes.values(), seconds, consequence),
            extra=attributes,
        )

    def _end(self, unresponsive: list[Execution], limit: float) -> None:
        self.ending = True
        for execution in unresponsive:
            self._report(execution, limit, f"the process ends with exit code {EXIT_CODE}")
        try:
            self._wait_for_others(limit)
            self._settle({*unresponsive, *self._unresponsive(limit)}, self._flush_seconds(limit))
        except Exception as error:
            logger.error(
                "ending without the last settlements (%s): other workers will run these tasks again", error
            )
        finally:
            os._exit(EXIT_CODE)

    def _flush_seconds(self, limit: float) -> float:
        """Timeout of calls: short while an execution goes on under a lock that another worker may hold."""
        now = time.monotonic()
        is_without_lock = any(execution.locks_expire_at <= now for execution in self._unresponsive(limit))
        return _URGENT_FLUSH_SECONDS if is_without_lock else SHUTDOWN_FLUSH_SECONDS

    def _wait_for_others(self, limit: float) -> None:
        """Give the other tasks the grace period, unless the event loop is blocked, or an unresponsive execution
        has lost its lock.
        """
        self._loop.call_soon_threadsafe(self._stop.set)
        ran = threading.Event()
        self._loop.call_soon_threadsafe(ran.set)
        if not ran.wait(self._flush_seconds(limit)):
            logger.warning(
                "the event loop is blocked: the other running tasks are cut off, and run again elsewhere"
            )
            return
        # They are cancelled when the grace period is over, and then need time to end.
        deadline = time.monotonic() + self._settings.grace_seconds + SHUTDOWN_FLUSH_SECONDS
        while time.monotonic() < deadline and len(self._running()) > len(self._unresponsive(limit)):
            if self._flush_seconds(limit) < SHUTDOWN_FLUSH_SECONDS:
                break
            time.sleep(0.05)
        flushed = asyncio.run_coroutine_threadsafe(self._executor.flush(), self._loop)
        with suppress(TimeoutError):
            flushed.result(self._flush_seconds(limit))

    def _settle(self, unresponsive: Collection[Execution], timeout_seconds: float) -> None:
        """Settle unresponsive executions as failed, by their retry policy. Call last: it frees their locks."""
        settlements = []
        for execution in unresponsive:
            outcome = execution.abandoned_outcome()
            if outcome is None:
                continue  # another worker has taken it over
            # With its dead letter: the database needs the event loop, so another worker imports it from Redis.
            settlements.append(settle(execution, outcome, self._settings))
        self._keeper.stop_renewing()
        with sync_client(
            self._broker.url,
            protocol=2,
            socket_timeout=timeout_seconds,
            socket_connect_timeout=min(2.0, timeout_seconds),
        ) as redis:
            worker = self._broker.consumer_name
            # First end the worker's own blocking read, which could get the requeued tasks.
            worker_state.end_wait(redis, worker)
            self._unread.requeue_now()
            worker_state.settle_now(redis, worker, settlements)
            worker_state.leave_now(redis, worker)


class BlockedLoopDetector:
    """Detects a task that blocks the event loop, and publishes the task, the time since then and the stack.

    Schedules callbacks in the event loop and checks that they run. Must be made in the thread of the loop. Code
    that holds the GIL (a C extension) stops the watchdog's thread as well; the lease of such a worker ends.

    Args:
        seconds: the loop counts as blocked when a callback has not run for this time.
        running: the executions of the worker; a live view.
        publish: publishes the description of the blocking task, or None when the loop goes on; may raise.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        seconds: float,
        running: Collection[Execution],
        publish: Callable[[dict[str, Any] | None], None],
    ) -> None:
        self._loop = loop
        self._thread_id = threading.get_ident()
        self._seconds = seconds
        self._running = running
        self._publish = publish
        self._callback_ran = threading.Event()
        self._callback_ran.set()
        self._callback_at = time.monotonic()
        self._suspected = False
        self._blocked: dict[str, Any] | None = None
        self._published_at = 0.0

    def check(self) -> None:
        """Check once; called about twice a second, in the watchdog's thread."""
        now = time.monotonic()
        if self._callback_ran.is_set():
            self._suspected = False
            if self._blocked is not None and self._try_publish(None):
                logger.warning("the event loop goes on, after %.0f s", time.time() - self._blocked["since"])
                self._blocked = None
            self._callback_ran, self._callback_at = threading.Event(), now
            try:
                self._loop.call_soon_threadsafe(self._callback_ran.set)
            except RuntimeError:  # the loop is closed
                self._callback_ran.set()
        elif now - self._callback_at >= self._seconds:
            # Found in two checks: after a pause of the whole process, the loop needs time to react.
            if not self._suspected:
                self._suspected = True
            elif self._blocked is None:
                self._blocked = self._describe(now)
                self._report(self._blocked)
                self._try_publish(self._blocked)
            elif now - self._published_at >= _PUBLISH_SECONDS:
                self._try_publish(self._blocked)

    def _describe(self, now: float) -> dict[str, Any]:
        execution = self._blocking()
        frame = sys._current_frames().get(self._thread_id)
        stack = "" if frame is None else mask("".join(traceback.format_stack(frame)))
        return {
            "since": time.time() - (now - self._callback_at),
            "task_id": None if execution is None else execution.message.task_id,
            "task_name": None if execution is None else execution.message.task_name,
            "stack": stack[-_LONGEST_STACK:],
        }

    def _blocking(self) -> Execution | None:
        """The execution of the current asyncio task, or the only running one; None if unknown."""
        running, current = list(self._running), asyncio.current_task(self._loop)
        found = [execution for execution in running if execution.running is current]
        return next(iter(found or (running if len(running) == 1 else ())), None)

    def _report(self, blocked: dict[str, Any]) -> None:
        label = f"{blocked['task_name']} {blocked['task_id']}" if blocked["task_id"] else "a task"
        logger.error(
            "%s blocks the event loop for more than %g s: nothing else of this worker goes on. It is at\n%s",
            label,
            self._seconds,
            blocked["stack"],
            extra={f"task.{name}": blocked[f"task_{name}"] for name in ("name", "id") if blocked["task_id"]},
        )

    def _try_publish(self, blocked: dict[str, Any] | None) -> bool:
        self._published_at = time.monotonic()
        try:
            self._publish(blocked)
        except Exception as error:
            logger.debug("the state of the event loop cannot be published: %s", error)
            return False
        return True
