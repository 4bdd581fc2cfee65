"""Publishes the statistics of a worker: one call every 5 s, or 50 s while nothing changes. Each execution only
adds to counters. A report that would hold nothing but counters is appended to a list instead, by one command, and
one of the workers adds up the counters of all.

A report that fails is sent again with the next one. `diracx.tasks.operations` reads them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Sequence
from functools import cache
from heapq import nsmallest
from operator import add
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError, ResponseError

from .._util.passwords import last_lines
from ..broker import worker_state
from ..broker.labels import LABEL_ATTEMPTS
from ..broker.requests import LOCK_KINDS
from ..broker.streams import queue_stream
from ..broker.telemetry import BUCKET_ENDS, BUCKETS
from ..exceptions import LockLostError, TaskCancelledError
from ..messages.codec import dumps
from ..messages.error_info import cut
from ..task_vo import vo_of_task
from .execution import Failed, LeaseLost, Outcome, Succeeded

if TYPE_CHECKING:
    from redis import Redis as SyncRedis

    from ..broker import RedisStreamBroker
    from ..broker.models import Settlement, TaskMessage
    from ..broker.replies import StartReply
    from .execution import Execution
    from .settings import WorkerSettings

logger = logging.getLogger(__name__)

#: Interval between two reports.
REPORT_SECONDS = 5.0
#: Reports that are skipped in a row while nothing has changed. The worker counts as silent after
#: `HealthThresholds.silent_seconds`.
MAX_SKIPPED = 9
#: Every so many reports, counters of finished tasks are sent when there is nothing else to report.
_SUMS_EVERY = 2
#: The worker that finds no counters of other workers in the list adds up the list with its next report. Should it
#: have stopped, counters as old as this are added up with the next report of an idle worker.
SUMS_OLD_MS = 20_000
#: Each time the list reaches a multiple of this length, one more worker adds it up.
_MANY_SUMS = 200
#: Time to live of counters in the list.
_SUMS_MS = 3_600_000
#: Running tasks in a report: the longest-running ones.
RUNNING_REPORTED = 200
#: Failures in one report: the latest. All are counted.
_FAILURES_REPORTED = 50
#: Locks in one report.
_LOCKS_REPORTED = 200
_LONGEST_TEXT = 1_000
_LONGEST_TRACEBACK = 4_000
_LOCKS_PER_TASK = 20
_MEBIBYTE = 1 << 20
#: Name under which tasks that cannot be executed are counted, for theirs may be anything.
REJECTED = "(cannot be executed)"


#: Fields of `TaskCounters` that are sent to the server, and all fields.
_REPORTED = ("done", "failed", "retried", "dead", "run", "queue")
_ALL_FIELDS = (*_REPORTED, "lock_waits", "locks_lost", "taken_over")


class TaskCounters:
    """Counters of the executions of one class from one queue."""

    def __init__(self) -> None:
        self.done = self.failed = self.retried = self.dead = 0
        self.lock_waits = self.locks_lost = self.taken_over = 0
        self.run = self.queue = 0.0
        self.run_times = [0] * BUCKETS
        self.queue_times = [0] * BUCKETS

    def add(self, other: TaskCounters) -> None:
        """Add the counters of `other`."""
        for name in _ALL_FIELDS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.run_times = list(map(add, self.run_times, other.run_times))
        self.queue_times = list(map(add, self.queue_times, other.queue_times))

    def counters(self) -> dict[str, float]:
        """Counters by name, as the server adds them up; without those that are 0."""
        counters: dict[str, float] = {name: getattr(self, name) for name in _REPORTED}
        for prefix, times in (("r", self.run_times), ("q", self.queue_times)):
            counters.update((f"{prefix}{bucket}", number) for bucket, number in enumerate(times) if number)
        return {name: number for name, number in counters.items() if number}


class Reporter:
    """Collects the statistics of one worker and publishes them.

    Args:
        running: the running executions; a live view.
        sums_old_ms: age of counters of other workers at which an idle worker adds them up.
    """

    def __init__(
        self,
        broker: RedisStreamBroker,
        settings: WorkerSettings,
        running: Collection[Execution],
        sums_old_ms: int = SUMS_OLD_MS,
    ) -> None:
        self._sums_old_ms = sums_old_ms
        self._broker = broker
        self._settings = settings
        self._running = running
        self._began = time.time()
        self._clock_ahead = 0.0  # offset of the server's clock against the worker's, in s
        self._number = 0
        self._stats: dict[tuple[str, str], TaskCounters] = {}  # by task and stream, since the last report
        self._totals: dict[tuple[str, str], TaskCounters] = {}  # the same, before that
        self._rejected: dict[str, int] = {}
        self._failures: deque[dict[str, Any]] = deque(maxlen=_FAILURES_REPORTED)
        self._locks: dict[str, None] = {}
        self._unsent: tuple[int, dict[str, Any]] | None = None
        self._last_sent: tuple[bytes, bytes] = (b"", b"")
        self._last_memory: int | None = None
        self._overwritten = False  # the watchdog has published the running tasks meanwhile
        self.timed: Callable[[str, str, float, float], None] | None = None
        """Called with name, stream, run time and time in the queue (s) of each execution; None: no call."""
        self._skipped = 0
        self._unsent_sums: tuple[int, dict[str, Any]] | None = None
        self._sums_sent = False
        """True if `_unsent_sums` were sent without a reply."""
        self.adds_up = False
        """True if this worker has to add up the counters in the list."""
        self._dataset = ""
        self.dataset: Callable[[], str] = str
        """Returns the id of the server's data: reports under another id are lost."""

    # --- collect ----------------------------------------------------------------------------------------

    def ended(self, execution: Execution, outcome: Outcome, settlement: Settlement) -> None:
        """Count an execution that has ended."""
        delivery = execution.delivery
        stream = delivery.stream
        key = (execution.spec.name, stream)
        counted = self._stats.get(key)
        if counted is None:
            counted = self._stats[key] = TaskCounters()
        if isinstance(outcome, Succeeded):
            counted.done += 1
        elif isinstance(outcome, Failed):
            counted.failed += 1
        elif isinstance(outcome, LeaseLost):
            counted.taken_over += 1
            return
        else:
            counted.lock_waits += 1
            return
        seconds = outcome.seconds
        queued = max(0.0, time.time() + self._clock_ahead - seconds - delivery.queued_at)
        counted.run += seconds
        counted.queue += queued
        counted.run_times[bisect_left(BUCKET_ENDS, seconds)] += 1
        counted.queue_times[bisect_left(BUCKET_ENDS, queued)] += 1
        if self.timed is not None:
            self.timed(key[0], stream, seconds, queued)
        if isinstance(outcome, Failed):
            self._failed(execution, outcome, settlement, counted)

    def _failed(
        self, execution: Execution, outcome: Failed, settlement: Settlement, counted: TaskCounters
    ) -> None:
        if settlement.retry is not None or settlement.requeue is not None:  # a requeue means an interruption
            result = "retried"
            counted.retried += 1
        elif settlement.dead is not None:
            result = "dead"
            counted.dead += 1
        else:
            result = "cancelled" if issubclass(type(outcome.error), TaskCancelledError) else "dropped"
        if issubclass(type(outcome.error), LockLostError):
            counted.locks_lost += 1
        message, error = execution.message, outcome.error_info
        text = cut(error["message"], _LONGEST_TEXT)
        traceback = last_lines(error["traceback"], _LONGEST_TRACEBACK)
        self._note_failure(message, vo_of_task(execution.task, message), error["type"], text, traceback, result)

    def rejected(self, message: TaskMessage | None, reason: str, detail: str, vo: str | None = None) -> None:
        """Count a delivery that cannot be executed and becomes a dead letter."""
        self._stats.setdefault((REJECTED, ""), TaskCounters()).dead += 1
        self._rejected[reason] = self._rejected.get(reason, 0) + 1
        self._note_failure(message, vo, reason, detail[:_LONGEST_TEXT], "", "dead")

    def _note_failure(
        self, message: TaskMessage | None, vo: str | None, type_: str, text: str, traceback: str, outcome: str
    ) -> None:
        self._failures.append(
            {
                "at": time.time() + self._clock_ahead,
                "task_id": "" if message is None else message.task_id[:_LONGEST_TEXT],
                "task_name": "" if message is None else message.task_name[:_LONGEST_TEXT],
                "vo": vo,
                "type": type_,
                "message": text,
                "traceback": traceback,
                "attempt": 1 if message is None else len(message.attempts) + 1,
                "worker": self._broker.consumer_name,
                "outcome": outcome,
            }
        )

    def count_lock_replies(self, requested: Sequence[Execution], replies: Sequence[StartReply]) -> None:
        """Count refused locks, and note the keys of limiters and refusing locks for the report."""
        for execution, reply in zip(requested, replies, strict=True):
            if reply.refusing is not None:
                key = (execution.spec.name, execution.delivery.stream)
                self._stats.setdefault(key, TaskCounters()).lock_waits += 1
            for position, lock in enumerate(execution.locks):
                if (position == reply.refusing or LOCK_KINDS[lock["kind"]].is_limiter) and (
                    len(self._locks) < _LOCKS_REPORTED
                ):
                    limit, window = lock.get("limit", ""), lock.get("window_us", "")
                    self._locks[f"{lock['kind']} {limit} {window} {lock['key']}"] = None

    # --- publish ----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Report at the interval, until cancelled."""
        while True:
            try:
                await self.report(if_new=True)
                await self._broker.close_spare_connections(REPORT_SECONDS if self._running else 0)
            except RedisError as error:
                logger.debug("a report did not get through: %s", error)
            except Exception:
                logger.exception("a report could not be made")
            await asyncio.sleep(REPORT_SECONDS)

    async def report(self, *, last: bool = False, if_new: bool = False) -> None:
        """Send one report.

        Args:
            last: the worker stops.
            if_new: the report may be skipped when nothing has changed.

        Raises:
            redis.exceptions.RedisError: when the server does not reply; the next report contains this one's data.
        """
        state = self.state()
        packed_state, running = dumps(state), dumps(self._reported_running())
        if self._overwritten or self._dataset != self.dataset():
            self._last_sent, self._overwritten = (b"", b""), False
        self._dataset = self.dataset()
        changed = [
            now if now != before else b""
            for now, before in zip((packed_state, running), self._last_sent, strict=True)
        ]
        if self._unsent is None:
            await self._send_sums()
        if self._unsent is None:
            sums_alone = not (changed[1] or self._has_changed(state) or self._failures or self._locks)
            if if_new and sums_alone and not self.adds_up:
                due = self._skipped >= MAX_SKIPPED
                self._skipped += 1
                if (due or self._skipped % _SUMS_EVERY == 1) and (collected := self._take_collected()):
                    self._unsent_sums = (self._next_number(), collected)
                    await self._send_sums()
                if not due or self.adds_up or self._unsent is not None:
                    return
            self._unsent = (self._next_number(), self._take_collected())
        number, added = self._unsent
        sent_at = time.time()
        older_ms = 0 if self.adds_up else None if added else self._sums_old_ms
        now_ms, known, self.adds_up = await worker_state.report(
            self._broker.redis, self._broker.consumer_name, number, changed[0], changed[1], added, last, older_ms
        )
        self._unsent, self._skipped = None, 0
        self._last_sent = (packed_state, running) if known or all(changed) else (b"", b"")
        self._last_memory = state.get("memory_bytes")
        half = (time.time() - sent_at) / 2
        ahead, error = now_ms / 1000 - (time.time() - half), half + 0.001
        if abs(ahead - self._clock_ahead) > error:  # a smaller change would only shift the shown start times
            self._clock_ahead = ahead

    def _has_changed(self, state: dict[str, Any]) -> bool:
        """True if anything but the memory, which changes all the time, differs from the last report."""
        state = {name: self._last_memory if name == "memory_bytes" else value for name, value in state.items()}
        return dumps(state) != self._last_sent[0]

    def _next_number(self) -> int:
        self._number = max(self._number + 1, int(1000 * (time.time() + self._clock_ahead)))
        return self._number

    async def _send_sums(self) -> None:
        """Append counters to the list. Their number identifies a repetition after a lost reply."""
        if self._unsent_sums is None:
            return
        sums = [self._broker.consumer_name, *self._unsent_sums]
        again, self._sums_sent = self._sums_sent, True
        try:
            length = await worker_state.send_sums(self._broker.redis, sums, _SUMS_MS, again=again)
        except ResponseError:  # a server without memory, say, which accepts reports all the same
            self._unsent, self._unsent_sums, self._sums_sent = self._unsent_sums, None, False
            return
        self._unsent_sums, self._sums_sent = None, False
        self.adds_up = length == 1 or length % _MANY_SUMS == 0

    def report_blocked(self, redis: SyncRedis, blocked: dict[str, Any] | None) -> None:
        """Publish the execution that blocks the event loop, from another thread; None: the loop goes on.

        Raises:
            redis.exceptions.RedisError: when the server does not reply.
        """
        # Readers use the clock of the server.
        packed = b"" if blocked is None else dumps(blocked | {"since": blocked["since"] + self._clock_ahead})
        worker_state.report_blocked(redis, self._broker.consumer_name, packed, dumps(self._reported_running()))
        self._overwritten = blocked is not None

    async def leave(self) -> None:
        """Send the last report: the worker has stopped."""
        try:
            if self._unsent is not None:
                await self.report()
            await self.report(last=True)
        except RedisError as error:
            logger.debug("the last report did not get through: %s", error)

    def _take_collected(self) -> dict[str, Any]:
        """Return the statistics collected since the last call, and reset them."""
        ended: dict[str, int] = {}
        by_name: dict[str, TaskCounters] = {}
        for (name, stream), counted in self._stats.items():
            by_name.setdefault(name, TaskCounters()).add(counted)
            if stream:
                queue = queue_stream(stream)
                self._totals.setdefault((name, queue), TaskCounters()).add(counted)
                ended[queue] = ended.get(queue, 0) + counted.done + counted.failed
        added = {
            "stats": {name: counters for name, counted in by_name.items() if (counters := counted.counters())},
            "ended": {queue: number for queue, number in ended.items() if number},
            "failures": [dumps(failure) for failure in self._failures],
            "locks": list(self._locks),
        }
        self._stats, self._locks = {}, {}
        self._failures.clear()
        return {name: value for name, value in added.items() if value}

    # --- metrics ----------------------------------------------------------------------------------------

    def totals(self) -> dict[tuple[str, str], TaskCounters]:
        """Counters since the worker started, by name of the task and stream of its queue."""
        found: dict[tuple[str, str], TaskCounters] = {}
        for sums_by in (self._totals, self._stats):
            for (name, stream), counted in sums_by.items():
                if stream:
                    found.setdefault((name, queue_stream(stream)), TaskCounters()).add(counted)
        return found

    def rejected_totals(self) -> dict[str, int]:
        """Number of deliveries that could not be executed, by reason."""
        return dict(self._rejected)

    def in_progress(self) -> dict[tuple[str, str], int]:
        """Number of running tasks, by name of the task and stream of its queue."""
        found: dict[tuple[str, str], int] = {}
        for execution in self._running:
            key = (execution.spec.name, queue_stream(execution.delivery.stream))
            found[key] = found.get(key, 0) + 1
        return found

    def state(self) -> dict[str, Any]:
        """State of the worker, as it is reported."""
        return {
            "size": str(self._broker.worker_size),
            "slots": self._settings.max_concurrent_tasks,
            "slots_used": len(self._running),
            "started": round(self._began + self._clock_ahead),
            "memory_bytes": _resident_bytes(),
            "version": _version(),
        }

    def _reported_running(self) -> list[dict[str, Any]]:
        now, running = time.monotonic(), []
        ahead = time.time() + self._clock_ahead - now
        for execution in nsmallest(RUNNING_REPORTED, self._running, key=lambda each: each.started or now):
            delivery, message = execution.delivery, execution.message
            locks = execution.locks[:_LOCKS_PER_TASK]
            overdue = execution.should_have_ended_at()
            running.append(
                {
                    "task_id": message.task_id,
                    "task_name": message.task_name,
                    "vo": vo_of_task(execution.task, message),
                    "stream": delivery.stream,
                    "entry": delivery.entry,
                    "deliveries": delivery.redelivery_count + 1,
                    "attempt": len(message.labels.get(LABEL_ATTEMPTS, ())) + 1,
                    **({} if overdue is None else {"overdue_since": round(ahead + overdue, 3)}),
                    "since": round(ahead + (now if execution.started is None else execution.started), 3),
                    "locks": [[lock["key"], lock["owner"]] for lock in locks],
                }
            )
        return running


@cache
def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("diracx-tasks")
    except PackageNotFoundError:  # runs from a source tree
        return ""


def _resident_bytes() -> int | None:
    """Resident memory, rounded down to MiB; None on systems without /proc."""
    try:
        with open("/proc/self/statm", "rb") as statm:
            pages = int(statm.read().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") // _MEBIBYTE * _MEBIBYTE
