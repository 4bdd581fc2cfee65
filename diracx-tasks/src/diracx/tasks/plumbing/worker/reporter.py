"""Publishes the statistics of a worker: one call every 5 s, or 50 s while nothing happens, from sums that cost an
execution a few additions. When there is nothing but such sums to tell, one command puts them into a list, and one
of the workers adds up those of all.

A report that does not get through is made up for by the next one. `diracx.tasks.operations` reads them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from functools import cache
from heapq import nsmallest
from operator import add
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError, ResponseError

from .._util.histogram import BUCKETS, bucket_of
from .._util.passwords import last_lines
from ..broker import worker_state
from ..broker.labels import LABEL_ATTEMPTS
from ..broker.streams import queue_stream
from ..exceptions import LockLostError, TaskCancelledError
from ..messages.codec import dumps
from ..messages.error_info import cut
from ..task_vo import vo_of_task
from .execution import Failed, LeaseLost, LockRefused, Outcome

if TYPE_CHECKING:
    from redis import Redis as SyncRedis

    from ..broker import RedisStreamBroker
    from ..broker.models import Settlement, TaskMessage
    from ..persistence import DeadLetter
    from .execution import Execution
    from .settings import WorkerSettings

logger = logging.getLogger(__name__)

#: Between two reports.
REPORT_SECONDS = 5.0
#: Reports that are left out, one after the other, when they would say nothing but that the worker is there. Others
#: count it as silent after `HealthThresholds.silent_seconds`.
_LEFT_OUT = 9
#: One of so many reports, when they would be sums of finished tasks alone: they wait for more.
_SUMS_EVERY = 2
#: The worker that finds no sums of others in the list adds up those that have come together until its next report.
#: Should it not be there, those that are as old as this are added up with the next report of an idle worker.
_SUMS_OLD_MS = 20_000
#: After so many sums in the list, one more worker adds them up.
_MANY_SUMS = 200
#: How long sums are kept that nobody adds up.
_SUMS_MS = 3_600_000
#: Running tasks that are told of; the longest-running ones.
RUNNING_REPORTED = 200
#: Failures told in one report: the latest. All are counted.
_FAILURES_TOLD = 50
#: Locks told in one report.
_LOCKS_TOLD = 200
_LONGEST_TEXT = 1_000
_LONGEST_TRACEBACK = 4_000
_LOCKS_PER_TASK = 20
_MEBIBYTE = 1 << 20
#: Tasks that cannot be executed may have any name: they are counted under this one.
REJECTED = "(cannot be executed)"


#: TaskCounters that the server is told, and all of them.
_TOLD = ("done", "failed", "retried", "dead", "run", "queue")
_NUMBERS = (*_TOLD, "lock_waits", "locks_lost", "taken_over")


class TaskCounters:
    """Counters of the executions of one class from one queue."""

    def __init__(self) -> None:
        self.done = self.failed = self.retried = self.dead = 0
        self.lock_waits = self.locks_lost = self.taken_over = 0
        self.run = self.queue = 0.0
        self.run_times = [0] * BUCKETS
        self.queue_times = [0] * BUCKETS

    def add(self, other: TaskCounters) -> None:
        """Add up."""
        for name in _NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.run_times = list(map(add, self.run_times, other.run_times))
        self.queue_times = list(map(add, self.queue_times, other.queue_times))

    def counters(self) -> dict[str, float]:
        """By name, as they are added up on the server; what is 0 is left out."""
        counters: dict[str, float] = {name: getattr(self, name) for name in _TOLD}
        for prefix, times in (("r", self.run_times), ("q", self.queue_times)):
            counters.update((f"{prefix}{bucket}", number) for bucket, number in enumerate(times) if number)
        return {name: number for name, number in counters.items() if number}


class Reporter:
    """Collects what one worker has to tell, and tells it.

    Args:
        running: what runs at the moment; a live view.
    """

    def __init__(
        self, broker: RedisStreamBroker, settings: WorkerSettings, running: Collection[Execution]
    ) -> None:
        self._broker = broker
        self._settings = settings
        self._running = running
        self._began = time.time()
        self._clock_ahead = 0.0  # of the server's clock against ours, in s
        self._number = 0
        self._stats: dict[tuple[str, str], TaskCounters] = {}  # by task and stream, since the last report
        self._totals: dict[tuple[str, str], TaskCounters] = {}  # the same, before that
        self._rejected: dict[str, int] = {}
        self._failures: deque[dict[str, Any]] = deque(maxlen=_FAILURES_TOLD)
        self._locks: dict[str, None] = {}
        self._unsent: tuple[int, dict[str, Any]] | None = None
        self._said: tuple[bytes, bytes] = (b"", b"")
        self._said_memory: int | None = None
        self._overwritten = False  # what it runs, by the watchdog
        self.timed: Callable[[str, str, float, float], None] | None = None
        """Is told name, stream, run time and time in the queue (s) of each execution, where that is wanted."""
        self._left_out = 0
        self._unsent_sums: tuple[int, dict[str, Any]] | None = None
        self._sums_sent = False
        """True if these were sent, and not answered."""
        self._adds_up = False
        """True if the sums in the list are this worker's to add up."""
        self._dataset = ""
        self.dataset: Callable[[], str] = str
        """Tells which life of the server's data this is: what was said in another is lost."""

    # --- what is noted ----------------------------------------------------------------------------------

    def ended(
        self, execution: Execution, outcome: Outcome, settlement: Settlement, dead_letter: DeadLetter | None
    ) -> None:
        """An execution has ended."""
        delivery = execution.delivery
        stream = delivery.stream
        which = (execution.spec.name, stream)
        sums = self._stats.get(which)
        if sums is None:
            sums = self._stats[which] = TaskCounters()
        if isinstance(outcome, LeaseLost):
            sums.taken_over += 1
            return
        if isinstance(outcome, LockRefused):
            sums.lock_waits += 1
            return
        seconds = outcome.seconds
        queued = max(0.0, time.time() + self._clock_ahead - seconds - delivery.queued_at)
        sums.run += seconds
        sums.queue += queued
        sums.run_times[bucket_of(seconds)] += 1
        sums.queue_times[bucket_of(queued)] += 1
        if self.timed is not None:
            self.timed(which[0], stream, seconds, queued)
        if isinstance(outcome, Failed):
            sums.failed += 1
            self._failed(execution, outcome, settlement, dead_letter, sums)
        else:
            sums.done += 1

    def _failed(
        self,
        execution: Execution,
        outcome: Failed,
        settlement: Settlement,
        dead_letter: DeadLetter | None,
        sums: TaskCounters,
    ) -> None:
        if settlement.retry is not None or settlement.requeue is not None:  # the latter was interrupted
            fate = "retried"
            sums.retried += 1
        elif dead_letter is not None:
            fate = "dead"
            sums.dead += 1
        else:
            fate = "cancelled" if issubclass(type(outcome.error), TaskCancelledError) else "dropped"
        if issubclass(type(outcome.error), LockLostError):
            sums.locks_lost += 1
        message, error = execution.message, outcome.told
        text = cut(error["message"], _LONGEST_TEXT)
        traceback = last_lines(error["traceback"], _LONGEST_TRACEBACK)
        self._note_failure(message, vo_of_task(execution.task, message), error["type"], text, traceback, fate)

    def rejected(self, message: TaskMessage | None, reason: str, detail: str, vo: str | None = None) -> None:
        """A delivery cannot be executed, and is put with the dead letters."""
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

    def asked_for_locks(self, asked: Sequence[Execution], replies: Sequence[Sequence[int]]) -> None:
        """Locks were granted or refused. Those that have limits, or that refused, are worth a look."""
        for execution, reply in zip(asked, replies, strict=True):
            refusing = reply[1] - 1 if reply[0] == 0 else -1
            if refusing >= 0:
                which = (execution.spec.name, execution.delivery.stream)
                self._stats.setdefault(which, TaskCounters()).lock_waits += 1
            for position, lock in enumerate(execution.locks):
                if (position == refusing or lock["kind"] in ("rate", "concurrency")) and (
                    len(self._locks) < _LOCKS_TOLD
                ):
                    limit, window = lock.get("limit", ""), lock.get("window_us", "")
                    self._locks[f"{lock['kind']} {limit} {window} {lock['key']}"] = None

    # --- what is told -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Report, for ever."""
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
        """Tell what is new.

        Args:
            last: the worker signs off.
            if_new: when there is nothing new, it may be left out.

        Raises:
            redis.exceptions.RedisError: when the server does not answer; nothing is forgotten then.
        """
        state = self._line()
        line, running = dumps(state), dumps(self._reported_running())
        if self._overwritten or self._dataset != self.dataset():
            self._said, self._overwritten = (b"", b""), False
        self._dataset = self.dataset()
        news = [now if now != before else b"" for now, before in zip((line, running), self._said, strict=True)]
        if self._unsent is None:
            await self._send_sums()
        if self._unsent is None:
            sums_alone = not (news[1] or self._is_news(state) or self._failures or self._locks)
            if if_new and sums_alone and not self._adds_up:
                due = self._left_out >= _LEFT_OUT
                self._left_out += 1
                if (due or self._left_out % _SUMS_EVERY == 1) and (taken := self._taken()):
                    self._unsent_sums = (self._next_number(), taken)
                    await self._send_sums()
                if not due or self._adds_up or self._unsent is not None:
                    return
            self._unsent = (self._next_number(), self._taken())
        number, added = self._unsent
        sent_at = time.time()
        older_ms = 0 if self._adds_up else None if added else _SUMS_OLD_MS
        now_ms, known, self._adds_up = await worker_state.report(
            self._broker.redis, self._broker.consumer_name, number, news[0], news[1], added, last, older_ms
        )
        self._unsent, self._left_out = None, 0
        self._said = (line, running) if known or all(news) else (b"", b"")
        self._said_memory = state.get("memory_bytes")
        half = (time.time() - sent_at) / 2
        ahead, error = now_ms / 1000 - (time.time() - half), half + 0.001
        if abs(ahead - self._clock_ahead) > error:  # else what runs would seem to have begun at another moment
            self._clock_ahead = ahead

    def _is_news(self, state: dict[str, Any]) -> bool:
        """True if anything but the memory, which changes all the time, is another than what was said."""
        said = {name: self._said_memory if name == "memory_bytes" else value for name, value in state.items()}
        return dumps(said) != self._said[0]

    def _next_number(self) -> int:
        self._number = max(self._number + 1, int(1000 * (time.time() + self._clock_ahead)))
        return self._number

    async def _send_sums(self) -> None:
        """Put sums into the list. They may come twice, if an answer is lost: they have a number."""
        if self._unsent_sums is None:
            return
        sums = [self._broker.consumer_name, *self._unsent_sums]
        again, self._sums_sent = self._sums_sent, True
        try:
            told = await worker_state.send_sums(self._broker.redis, sums, _SUMS_MS, again=again)
        except ResponseError:  # as of a full server, which takes reports all the same
            self._unsent, self._unsent_sums, self._sums_sent = self._unsent_sums, None, False
            return
        self._unsent_sums, self._sums_sent = None, False
        self._adds_up = told == 1 or told % _MANY_SUMS == 0

    def report_blocked(self, redis: SyncRedis, blocked: dict[str, Any] | None) -> None:
        """Say what blocks the event loop, from another thread; None: nothing does any more.

        Raises:
            redis.exceptions.RedisError: when the server does not answer.
        """
        # The clock of the server is what readers go by.
        told = b"" if blocked is None else dumps(blocked | {"since": blocked["since"] + self._clock_ahead})
        worker_state.report_blocked(redis, self._broker.consumer_name, told, dumps(self._reported_running()))
        self._overwritten = blocked is not None

    async def leave(self) -> None:
        """Tell the last of it, and that the worker runs no more."""
        try:
            if self._unsent is not None:
                await self.report()
            await self.report(last=True)
        except RedisError as error:
            logger.debug("the last report did not get through: %s", error)

    def _taken(self) -> dict[str, Any]:
        """Take the statistics that were collected since the last time."""
        ended: dict[str, int] = {}
        told: dict[str, TaskCounters] = {}
        for (name, stream), sums in self._stats.items():
            told.setdefault(name, TaskCounters()).add(sums)
            if stream:
                queue = queue_stream(stream)
                self._totals.setdefault((name, queue), TaskCounters()).add(sums)
                ended[queue] = ended.get(queue, 0) + sums.done + sums.failed
        added = {
            "stats": {name: counters for name, sums in told.items() if (counters := sums.counters())},
            "ended": {queue: number for queue, number in ended.items() if number},
            "failures": [dumps(failure) for failure in self._failures],
            "locks": list(self._locks),
        }
        self._stats, self._locks = {}, {}
        self._failures.clear()
        return {name: value for name, value in added.items() if value}

    # --- what metrics tell ------------------------------------------------------------------------------

    def totals(self) -> dict[tuple[str, str], TaskCounters]:
        """Since the worker began: by name of the task, and stream of its queue."""
        found: dict[tuple[str, str], TaskCounters] = {}
        for sums_by in (self._totals, self._stats):
            for (name, stream), sums in sums_by.items():
                if stream:
                    found.setdefault((name, queue_stream(stream)), TaskCounters()).add(sums)
        return found

    def rejected_totals(self) -> dict[str, int]:
        """Deliveries that could not be executed, by reason."""
        return dict(self._rejected)

    def in_progress(self) -> dict[tuple[str, str], int]:
        """Number of running tasks, by name of the task and stream of its queue."""
        found: dict[tuple[str, str], int] = {}
        for execution in self._running:
            which = (execution.spec.name, queue_stream(execution.delivery.stream))
            found[which] = found.get(which, 0) + 1
        return found

    def _line(self) -> dict[str, Any]:
        return {
            "size": str(self._broker.worker_size),
            "slots": self._settings.max_concurrent_tasks,
            "slots_used": len(self._running),
            "started": round(self._began + self._clock_ahead),
            "memory_bytes": _resident_bytes(),
            "version": _version(),
        }

    def _reported_running(self) -> list[dict[str, Any]]:
        now, told = time.monotonic(), []
        ahead = time.time() + self._clock_ahead - now
        for execution in nsmallest(RUNNING_REPORTED, self._running, key=lambda each: each.started or now):
            delivery, message = execution.delivery, execution.message
            locks = execution.locks[:_LOCKS_PER_TASK]
            overdue = execution.should_have_ended_at()
            told.append(
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
        return told


@cache
def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("diracx-tasks")
    except PackageNotFoundError:  # run from its sources
        return ""


def _resident_bytes() -> int | None:
    """Resident memory, by the MiB; None where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as statm:
            pages = int(statm.read().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") // _MEBIBYTE * _MEBIBYTE
