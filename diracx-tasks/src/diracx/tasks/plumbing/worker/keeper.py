"""The lease keeper: renews the leases and locks of a worker, and cancels executions before their locks expire.

A task that blocks the event loop must not lose its lease or its locks, so the keeper has a thread and a connection
of its own. It reports lost leases to the loop, and forwards the messages of the worker's pub/sub channels, which
arrive on the same connection.

A second thread is the timer of the leases. It never waits for a socket, so a renewal that hangs does not delay it:
an execution with locks is cancelled at the end of its lease, or of its shortest lock, less a margin. That time is
counted from before the last confirmed renewal was sent, while a reclaiming worker waits for the whole lease.
Two owners of one lock would need monotonic clocks that differ by more than the margin in one lease.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from .._util.retrying import Outage, reason
from .._util.tasks import CallsInRounds, in_own_thread
from ..broker import worker_state
from ..broker.control import ControlConnection
from ..broker.models import Settlement
from ..broker.sizes import LOCK_BYTES, in_calls
from ..locks import SAFETY_MARGIN

if TYPE_CHECKING:
    from ..broker.models import Delivery
    from ..broker.requests import Entry, LockSpec

logger = logging.getLogger(__name__)

#: Pause before a failed renewal is tried again.
_RETRY_SECONDS = 0.2
#: Part of a lease by which the end of another worker's lease may be noticed late.
_SLACK = 0.01
#: Every so many renewals also check that the server's lists of workers are complete.
COMPLETE_EVERY = 12
#: Deliveries that one call renews: 1 ms of the server's time.
_RENEW_BATCH = 250


class Leased(Protocol):
    """A stream entry and its locks that are renewed: an execution, or a settlement that is not sent yet."""

    @property
    def delivery(self) -> Delivery:
        """The entry."""

    @property
    def locks(self) -> Sequence[LockSpec]:
        """The locks."""

    locks_expire_at: float
    """Time (`time.monotonic`) from which another worker may hold its locks; set by the keeper."""

    def on_lease_lost(self, reason: str, taken_over: bool) -> None:
        """Called in the event loop when a lock is lost, or, with `taken_over`, the lease."""

    def cancel(self) -> None:
        """Called in the event loop when the task was cancelled."""

    def mark_cancelled(self) -> None:
        """Called in the keeper's thread before `on_lease_lost`."""


@dataclass(slots=True, eq=False)
class PendingAck:
    """A delivery whose execution has ended and that waits for its settlement: there is nothing to cancel."""

    delivery: Delivery
    locks: Sequence[LockSpec] = ()
    locks_expire_at: float = math.inf

    def on_lease_lost(self, reason: str, taken_over: bool) -> None:
        """Do nothing: the broker will refuse the settlement."""

    def cancel(self) -> None:
        """Do nothing: the execution has ended."""

    def mark_cancelled(self) -> None:
        """Do nothing: the execution has ended."""


@dataclass(frozen=True)
class _Renewed:
    """Result of one call: the renewed leases, and the `dataset_id` of the server."""

    lost: list[Leased]
    lost_locks: list[tuple[Leased, LockSpec]]
    cancelled: list[Leased]
    dataset_id: str
    shortest_ms: int  # the shortest lease of all workers
    quiet_ms: int  # time in which no worker's lease can end


def _size(leased: Leased) -> int:
    """Size of its renewal in a call: the script reads the message if there are marks of cancelled tasks."""
    return len(leased.delivery.raw) + LOCK_BYTES * len(leased.locks)


class _WithoutLocks:
    """An execution that has lost its locks and is being cancelled; its entry is renewed until it is settled."""

    def __init__(self, leased: Leased) -> None:
        self.delivery = leased.delivery
        self.locks: Sequence[LockSpec] = ()
        self.lost_locks = leased.locks
        self.locks_expire_at = math.inf
        self.on_lease_lost, self.cancel, self.mark_cancelled = (
            leased.on_lease_lost,
            leased.cancel,
            leased.mark_cancelled,
        )


class LeaseKeeper:
    """Renews the worker's lease, the entries that it holds and their locks.

    Use as an asynchronous context manager: entering registers the worker, and raises when no server replies.

    Args:
        channels: pub/sub channels to subscribe to between renewals.
        receive: called in the event loop with channel and data of each message.
        listening: called in the event loop after each subscription: earlier messages were missed.
    """

    def __init__(
        self,
        url: str,
        consumer: str,
        lease_seconds: float,
        loop: asyncio.AbstractEventLoop,
        channels: Sequence[str] = (),
        receive: Callable[[bytes, bytes], None] = lambda channel, data: None,
        listening: Callable[[], None] = lambda: None,
    ) -> None:
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        self._redis = ControlConnection(
            url,
            channels,
            lambda channel, data: self._call_in_loop(receive, channel, data),
            lambda: self._call_in_loop(listening),
            retry=Retry(NoBackoff(), 0),
            socket_connect_timeout=min(5.0, lease_seconds),
            socket_timeout=min(5.0, lease_seconds),
        )
        self._consumer = consumer
        self._lease_seconds = lease_seconds
        self._loop = loop
        self._leased: dict[tuple[str, str], Leased] = {}
        self._restored: dict[tuple[str, str], Leased] = {}
        """Deliveries that this worker restored on a server that had lost its data, until they are settled."""
        self._mutex = threading.Lock()
        self._timer_set = threading.Condition(self._mutex)
        self._timer_at = math.inf
        self._renewing = threading.Lock()
        self.dataset_id = ""
        """Id of the server's data at the last renewal; another id means that data was lost."""
        self.quiet_until = 0.0
        """Time (`time.monotonic`) before which no worker's lease ends."""
        self._renewals = 0
        self._stop = False
        self._shortest_lease = lease_seconds
        self._shortest_ttl = math.inf
        self._renewed_at = time.monotonic()
        self._cancelling = CallsInRounds()
        self._revived_at = float("-inf")
        """Time of the last renewal that came after the end of the lease (`time.monotonic`)."""
        self._thread = threading.Thread(target=self._run, name="diracx-lease-keeper", daemon=True)
        self._timer = threading.Thread(target=self._run_timer, name="diracx-lease-timer", daemon=True)

    async def __aenter__(self) -> LeaseKeeper:
        await self.renew()
        self._thread.start()
        self._timer.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop = True
        self._redis.interrupt()
        with self._timer_set:
            self._timer_set.notify()
        await in_own_thread(self._thread.join)
        await in_own_thread(self._timer.join)
        self._redis.close()

    def stop_renewing(self) -> None:
        """Stop renewing, from any thread; return when no renewal is running.

        For a process that ends at once: a later renewal would put the worker back on the lists that it has left.
        """
        with self._renewing:
            self._stop = True

    def requeue_unread(self, streams: Sequence[str]) -> None:
        """Requeue deliveries that are reserved for the worker but not held, as its event loop is blocked.

        Raises:
            redis.exceptions.RedisError: when the server does not reply.
        """
        worker_state.requeue_unread(self._redis, self._consumer, streams, self.held())

    def renew_soon(self) -> None:
        """Renew everything now, in the keeper's thread."""
        self._redis.interrupt()

    @property
    def overdue(self) -> bool:
        """True if the lease has ended since the last renewal: the process was paused, or had no connection."""
        return time.monotonic() - self._renewed_at >= self._lease_seconds

    @property
    def late(self) -> bool:
        """True if a renewal is missing: locks taken now could expire soon. Renew first."""
        return time.monotonic() - self._renewed_at >= self._lease_seconds / 2

    def expired_since(self, moment: float) -> bool:
        """True if the lease may have ended after `moment` (of the monotonic clock), renewed since or not: another
        worker may have reclaimed deliveries of that time.
        """
        return self.overdue or self._revived_at >= moment

    def add(self, all_leased: Iterable[Leased], granted_at: float = math.inf) -> None:
        """Renew these from now on.

        Args:
            granted_at: a time (`time.monotonic`) before the server granted their locks.
        """
        with self._mutex:
            for leased in all_leased:
                self._leased[leased.delivery.stream, leased.delivery.entry] = leased
                if leased.locks:
                    ttl_seconds = self._ttl_seconds(leased.locks)
                    self._renew_in_time(ttl_seconds)
                    self._expire(leased, min(self._renewed_at + self._lease_seconds, granted_at + ttl_seconds))

    def _expire(self, leased: Leased, end: float) -> None:
        """Set the time from which another worker may hold the locks: `end` (`time.monotonic`), less a margin."""
        ttl_seconds = min(self._lease_seconds, self._ttl_seconds(leased.locks))
        leased.locks_expire_at = end - SAFETY_MARGIN * ttl_seconds
        if leased.locks_expire_at < self._timer_at:
            self._timer_set.notify()

    @staticmethod
    def _ttl_seconds(locks: Sequence[LockSpec]) -> float:
        """Shortest time to live of the locks; infinity without one."""
        return min((lock["ttl_ms"] / 1000 for lock in locks if "ttl_ms" in lock), default=math.inf)

    def _renew_in_time(self, ttl_seconds: float) -> None:
        sooner = ttl_seconds / 3 < self._interval
        self._shortest_ttl = min(self._shortest_ttl, ttl_seconds)
        if sooner:
            self._redis.interrupt()

    @property
    def _interval(self) -> float:
        return min(self._lease_seconds, self._shortest_lease, self._shortest_ttl) / 3

    def forget(self, deliveries: Iterable[Delivery]) -> None:
        """Stop renewing deliveries that were settled or lost."""
        with self._mutex:
            for delivery in deliveries:
                key = delivery.stream, delivery.entry
                leased = self._leased.get(key)
                # A later delivery of the same entry may be held now, reclaimed from the worker that took it over.
                if leased is not None and leased.delivery.deliveries == delivery.deliveries:
                    del self._leased[key]
                if self._restored and key in self._restored:
                    self._redis.interrupt()

    def held(self) -> list[tuple[str, str]]:
        """Stream and entry of each delivery that is renewed."""
        with self._mutex:
            return list(self._leased)

    def held_locks(self) -> list[LockSpec]:
        """Locks that are renewed, and lost ones until their execution has released them."""
        with self._mutex:
            all_leased = list(self._leased.values())
        return [
            lock
            for leased in all_leased
            for lock in (leased.lost_locks if isinstance(leased, _WithoutLocks) else leased.locks)
        ]

    def _run(self) -> None:
        outage = Outage(f"renew the lease of {self._consumer}", logger)
        while not self._stop:
            self._redis.listen(self._interval)
            while not self._stop:
                try:
                    self._renew(complete=False)
                    outage.over()
                    break
                except Exception as error:
                    outage.failed(reason(error))
                    self._redis.listen(_RETRY_SECONDS)

    def _call_in_loop(self, call: Callable[..., None], *arguments: bytes) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(call, *arguments)

    def _run_timer(self) -> None:
        while not self._stop:
            with self._timer_set:
                now = time.monotonic()
                expired = [leased for leased in self._leased.values() if leased.locks_expire_at <= now]
                if not expired and not self._stop:
                    # Without locks, wait as long as a new lock lasts at most, so that few of them reset the timer.
                    longest = (1 - SAFETY_MARGIN) * self._lease_seconds
                    self._timer_at = min(
                        [now + longest, *(leased.locks_expire_at for leased in self._leased.values())]
                    )
                    self._timer_set.wait(self._timer_at - now)
            for leased in expired:
                self._report(leased, "its locks could not be renewed in time, and may be another's soon")

    async def renew(self, *, complete: bool = True) -> None:
        """Renew everything now, from the event loop.

        Args:
            complete: also what only every `COMPLETE_EVERY`th renewal includes.

        Raises:
            redis.exceptions.RedisError: when the server does not reply.
        """
        await in_own_thread(partial(self._renew, complete=complete))

    def _renew(self, *, complete: bool = True) -> None:
        with self._renewing:
            if not self._stop:
                self._renewals += 1
                # After the end of the lease, other workers may have removed this one from the lists.
                self._renew_alone(complete or self.overdue or self._renewals % COMPLETE_EVERY == 0)

    def _renew_alone(self, complete: bool) -> None:
        with self._mutex:
            all_leased = list(self._leased.values())
            if complete:  # not each time, or the next short lock would end the wait again
                self._shortest_ttl = min((self._ttl_seconds(each.locks) for each in all_leased), default=math.inf)
        # In batches; the lease counts from the time before the first call, once all are confirmed.
        batches = list(in_calls(all_leased, _RENEW_BATCH, _size)) or [[]]
        started = time.monotonic()
        renewed = [self.renew_batch(batch, complete) for batch in batches]
        while len({each.dataset_id for each in renewed}) > 1:  # the server has lost its data in between
            renewed = [self.renew_batch(batch, complete) for batch in batches]
        dataset_id = renewed[0].dataset_id
        if time.monotonic() - self._renewed_at >= self._lease_seconds:
            self._revived_at = time.monotonic()
        self._renewed_at = started
        # Renewing at the pace of the shortest lease distinguishes a dead worker from a server that was unavailable
        # for longer than that worker's lease.
        self._shortest_lease = renewed[-1].shortest_ms / 1000
        # With some slack, so that a renewal due at that moment has arrived before the intake polls.
        self.quiet_until = started + renewed[0].quiet_ms / 1000 + _SLACK * self._lease_seconds
        with self._mutex:
            for leased in all_leased:
                if leased.locks and leased.locks_expire_at > time.monotonic():
                    self._expire(leased, started + min(self._lease_seconds, self._ttl_seconds(leased.locks)))
        if self.dataset_id not in ("", dataset_id):
            logger.warning(
                "the server has lost data, or was restarted and may have; %d running tasks go on", len(all_leased)
            )
            with self._mutex:
                self._restored = {(leased.delivery.stream, leased.delivery.entry): leased for leased in all_leased}
        self.dataset_id = dataset_id
        for each in renewed:
            for leased in each.lost:
                self._report(leased, "another worker has it, or had it and has settled it", taken_over=True)
            if each.cancelled:
                self._loop.call_soon_threadsafe(self._cancelling.add, [leased.cancel for leased in each.cancelled])
            for leased, lock in each.lost_locks:
                self._report(leased, f"the lock {lock['key']} could not be renewed")
        if self._restored:
            self._settle_restored()

    def _settle_restored(self) -> None:
        """Settle again deliveries that were settled just before a renewal that restored them.

        A renewal after a loss of data records each held entry and its locks again, also of a delivery that a
        concurrent settlement has ended.
        """
        with self._mutex:
            ended = {key: leased for key, leased in self._restored.items() if key not in self._leased}
        settlements = [Settlement(leased.delivery, leased.locks) for leased in ended.values()]
        for batch in in_calls(settlements, _RENEW_BATCH, Settlement.bytes):
            worker_state.settle_now(self._redis, self._consumer, batch)
        for key in ended:
            del self._restored[key]

    def renew_batch(self, all_leased: Sequence[Leased], complete: bool) -> _Renewed:
        """Renew some deliveries and their locks, in one call."""
        entries: list[Entry] = [
            {"stream": h.delivery.stream, "entry": h.delivery.entry, "deliveries": h.delivery.deliveries}
            for h in all_leased
        ]
        locks = [(leased, lock) for leased in all_leased for lock in leased.locks]
        lost_entries, lost_locks, cancelled, dataset_id, shortest_ms, quiet_ms = worker_state.renew(
            self._redis,
            self._consumer,
            int(self._lease_seconds * 1000),
            entries,
            [lock for _, lock in locks],
            self.dataset_id,
            None if complete else round(1000 * self._shortest_lease),
            self.overdue,
        )
        return _Renewed(
            [all_leased[position] for position in lost_entries],
            [locks[position] for position in lost_locks],
            [all_leased[position] for position in cancelled],
            dataset_id,
            shortest_ms,
            quiet_ms,
        )

    def _report(self, leased: Leased, reason: str, *, taken_over: bool = False) -> None:
        with self._mutex:
            key = leased.delivery.stream, leased.delivery.entry
            if self._leased.get(key) is not leased:
                return  # it was settled during the renewal
            if taken_over:
                del self._leased[key]
            else:  # this worker still has to settle it
                self._leased[key] = _WithoutLocks(leased)
        if leased.locks:
            leased.locks_expire_at = min(leased.locks_expire_at, time.monotonic())
        leased.mark_cancelled()
        self._loop.call_soon_threadsafe(leased.on_lease_lost, reason, taken_over)
