"""The lease keeper: renews all that a worker holds, and cancels what holds locks before they can be another's.

A task that blocks the event loop must not lose its lease or its locks, so the keeper shares nothing with
the loop: its own thread, its own connection. What could not be renewed is reported back to the loop, and so is
what the worker's channels say, which come by the same connection.

A second thread is the timer of the leases. It never waits for a socket, so a renewal that hangs does not hold it
back: an execution with locks is cancelled at the end of its lease, or of its shortest lock, less a margin, counted
from the moment before the last renewal that the server confirmed was sent. Whoever takes over waits for the whole
lease. Two owners of one lock would need monotonic clocks that differ by more than the margin in one lease.
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
from typing import TYPE_CHECKING, Protocol

from .._util.tasks import CallsInRounds
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
#: The part of a lease by which the end of others' leases may be noticed late.
_SLACK = 0.01
#: One of so many renewals looks whether the lists of the server are complete.
_COMPLETE_EVERY = 12
#: Deliveries that one call renews: 1 ms of the server's time.
_RENEW_BATCH = 250


class Leased(Protocol):
    """A stream entry and locks that are to be kept: an execution, or what is left to do after it."""

    @property
    def delivery(self) -> Delivery:
        """The entry."""

    @property
    def locks(self) -> Sequence[LockSpec]:
        """The locks."""

    locks_expire_at: float
    """Time (`time.monotonic`) from which its locks may be another's; set by the keeper, infinity without locks."""

    def on_lease_lost(self, what: str, taken_over: bool) -> None:
        """Called in the event loop: what was lost, in words; whether the task itself was taken over."""

    def cancel(self) -> None:
        """Called in the event loop when the task was cancelled."""

    def mark_cancelled(self) -> None:
        """Called at once, in the keeper's thread, before either of the others."""


@dataclass(slots=True, eq=False)
class PendingAck:
    """A hold of something that is over and only has to be settled: there is nothing to cancel any more."""

    delivery: Delivery
    locks: Sequence[LockSpec] = ()
    locks_expire_at: float = math.inf

    def on_lease_lost(self, what: str, taken_over: bool) -> None:
        """The settlement will be refused, which is enough."""

    def cancel(self) -> None:
        """It has ended."""

    def mark_cancelled(self) -> None:
        """It has ended."""


@dataclass(frozen=True)
class _Renewed:
    """Result of one call: the renewed leases, and the `dataset_id` of the server."""

    lost: list[Leased]
    lost_locks: list[tuple[Leased, LockSpec]]
    cancelled: list[Leased]
    dataset_id: str
    shortest_ms: int  # the shortest lease of all workers
    quiet_ms: int  # for so long no worker's lease can end


def _size(hold: Leased) -> int:
    """Size of its renewal in a call: where marks of cancelled tasks are, its message is read."""
    return len(hold.delivery.raw) + LOCK_BYTES * len(hold.locks)


class _WithoutLocks:
    """A hold that has lost its locks: it is going to end, and its entry is kept until it is settled."""

    def __init__(self, hold: Leased) -> None:
        self.delivery = hold.delivery
        self.locks: Sequence[LockSpec] = ()
        self.lost_locks = hold.locks
        self.locks_expire_at = math.inf
        self.on_lease_lost, self.cancel, self.mark_cancelled = hold.on_lease_lost, hold.cancel, hold.mark_cancelled


class LeaseKeeper:
    """Renews the worker's own life, the entries it runs and the locks they hold.

    Use as an asynchronous context manager: entering registers the worker, and raises when no server answers.

    Args:
        channels: to which it listens between renewals.
        hear: called in the event loop with channel and data of each message.
        listening: called in the event loop each time it has begun to listen: it has heard nothing before.
    """

    def __init__(
        self,
        url: str,
        consumer: str,
        lease_seconds: float,
        loop: asyncio.AbstractEventLoop,
        channels: Sequence[str] = (),
        hear: Callable[[bytes, bytes], None] = lambda channel, data: None,
        listening: Callable[[], None] = lambda: None,
    ) -> None:
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        self._redis = ControlConnection(
            url,
            channels,
            lambda channel, data: self._tell_loop(hear, channel, data),
            lambda: self._tell_loop(listening),
            retry=Retry(NoBackoff(), 0),
            socket_connect_timeout=min(5.0, lease_seconds),
            socket_timeout=min(5.0, lease_seconds),
        )
        self._consumer = consumer
        self._lease_seconds = lease_seconds
        self._loop = loop
        self._holds: dict[tuple[str, str], Leased] = {}
        self._restored: dict[tuple[str, str], Leased] = {}
        """Deliveries noted as ours on a server that had lost its data, until they are settled."""
        self._mutex = threading.Lock()
        self._timer_set = threading.Condition(self._mutex)
        self._timer_at = math.inf
        self._renewing = threading.Lock()
        self.dataset_id = ""
        """The life of the server's data in which everything was renewed last."""
        self.quiet_until = 0.0
        """No worker's lease ends before that (`time.monotonic`)."""
        self._renewals = 0
        self._stop = False
        self._shortest_lease = lease_seconds
        self._shortest_ttl = math.inf
        self._renewed_at = time.monotonic()
        self._cancelling = CallsInRounds()
        self._revived_at = float("-inf")
        """Time of the last renewal of a lease that may have ended before."""
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
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._timer.join)
        self._redis.close()

    def stop_renewing(self) -> None:
        """Renew nothing any more: returns when no renewal is under way, and none begins after that.

        For a process that ends at once, from any thread: a renewal would put the worker back on the lists that
        it has left.
        """
        with self._renewing:
            self._stop = True

    def hand_back_unread(self, streams: Sequence[str]) -> None:
        """Hand back what was reserved for the worker and is not kept renewed, as its event loop does not read it.

        Raises:
            redis.exceptions.RedisError: when the server does not answer.
        """
        worker_state.hand_back(self._redis, self._consumer, streams, self.held())

    def renew_soon(self) -> None:
        """Renew everything now, in the keeper's thread."""
        self._redis.interrupt()

    @property
    def overdue(self) -> bool:
        """True if the last renewal is so long ago that the worker counts as dead: it was paused, or cut off."""
        return time.monotonic() - self._renewed_at >= self._lease_seconds

    @property
    def late(self) -> bool:
        """True if a renewal is missing: what takes locks now might soon be cut off. Renew first."""
        return time.monotonic() - self._renewed_at >= self._lease_seconds / 2

    def expired_since(self, moment: float) -> bool:
        """True if the lease may have ended after `moment` (of the monotonic clock), renewed since or not: what we
        were given then may have been taken over.
        """
        return self.overdue or self._revived_at >= moment

    def add(self, holds: Iterable[Leased], granted_at: float = math.inf) -> None:
        """Keep these renewed from now on.

        Args:
            granted_at: a moment (`time.monotonic`) before the server granted their locks.
        """
        with self._mutex:
            for hold in holds:
                self._holds[hold.delivery.stream, hold.delivery.entry] = hold
                if hold.locks:
                    ttl_seconds = self._ttl_seconds(hold.locks)
                    self._look_in_time(ttl_seconds)
                    self._expire(hold, min(self._renewed_at + self._lease_seconds, granted_at + ttl_seconds))

    def _expire(self, hold: Leased, end: float) -> None:
        """The locks of the hold may be another's from `end` (`time.monotonic`) on."""
        ttl_seconds = min(self._lease_seconds, self._ttl_seconds(hold.locks))
        hold.locks_expire_at = end - SAFETY_MARGIN * ttl_seconds
        if hold.locks_expire_at < self._timer_at:
            self._timer_set.notify()

    @staticmethod
    def _ttl_seconds(locks: Sequence[LockSpec]) -> float:
        """After so long without a renewal the server drops the first of them."""
        return min((lock["ttl_ms"] / 1000 for lock in locks if "ttl_ms" in lock), default=math.inf)

    def _look_in_time(self, ttl_seconds: float) -> None:
        sooner = ttl_seconds / 3 < self._interval
        self._shortest_ttl = min(self._shortest_ttl, ttl_seconds)
        if sooner:
            self._redis.interrupt()

    @property
    def _interval(self) -> float:
        return min(self._lease_seconds, self._shortest_lease, self._shortest_ttl) / 3

    def forget(self, deliveries: Iterable[Delivery]) -> None:
        """No longer renew them: they were settled, or are lost."""
        with self._mutex:
            for delivery in deliveries:
                place = delivery.stream, delivery.entry
                hold = self._holds.get(place)
                # The same entry may be in our hands again, taken back from the worker that had taken it over.
                if hold is not None and hold.delivery.deliveries == delivery.deliveries:
                    del self._holds[place]
                if place in self._restored:
                    self._redis.interrupt()

    def held(self) -> list[tuple[str, str]]:
        """Stream and entry of everything that is kept renewed."""
        with self._mutex:
            return list(self._holds)

    def held_locks(self) -> list[LockSpec]:
        """The locks of what is kept renewed, and lost ones as well until their execution gives them back."""
        with self._mutex:
            holds = list(self._holds.values())
        return [
            lock for hold in holds for lock in (hold.lost_locks if isinstance(hold, _WithoutLocks) else hold.locks)
        ]

    def _run(self) -> None:
        while not self._stop:
            self._redis.listen(self._interval)
            while not self._stop:
                try:
                    self._renew(complete=False)
                    break
                except Exception as error:
                    logger.warning("cannot renew the lease of %s: %s", self._consumer, error)
                    self._redis.listen(_RETRY_SECONDS)

    def _tell_loop(self, call: Callable[..., None], *arguments: bytes) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(call, *arguments)

    def _run_timer(self) -> None:
        while not self._stop:
            with self._timer_set:
                now = time.monotonic()
                expired = [hold for hold in self._holds.values() if hold.locks_expire_at <= now]
                if not expired and not self._stop:
                    # With nothing to watch, for as long as a lock that comes next lasts, so that few set it anew.
                    longest = (1 - SAFETY_MARGIN) * self._lease_seconds
                    self._timer_at = min([now + longest, *(hold.locks_expire_at for hold in self._holds.values())])
                    self._timer_set.wait(self._timer_at - now)
            for hold in expired:
                self._report(hold, "its locks could not be renewed in time, and may be another's soon")

    async def renew(self) -> None:
        """Renew everything now, from the event loop.

        Raises:
            redis.exceptions.RedisError: when the server does not answer.
        """
        await asyncio.to_thread(self._renew)

    def _renew(self, *, complete: bool = True) -> None:
        with self._renewing:
            if not self._stop:
                self._renewals += 1
                # Where the lease has ended, others may have taken the worker off their lists.
                self._renew_alone(complete or self.overdue or self._renewals % _COMPLETE_EVERY == 0)

    def _renew_alone(self, complete: bool) -> None:
        with self._mutex:
            holds = list(self._holds.values())
        # Some in each call; the lease counts from the moment before the first of them, once all are confirmed.
        portions = list(in_calls(holds, _RENEW_BATCH, _size)) or [[]]
        started = time.monotonic()
        renewed = [self._renew_some(portion, complete) for portion in portions]
        while len({each.dataset_id for each in renewed}) > 1:  # the server has lost its data in between
            renewed = [self._renew_some(portion, complete) for portion in portions]
        dataset_id = renewed[0].dataset_id
        if time.monotonic() - self._renewed_at >= self._lease_seconds:
            self._revived_at = time.monotonic()
        self._renewed_at = started
        # Else nobody could tell a worker that died from a server that was away for longer than its lease.
        self._shortest_lease = renewed[-1].shortest_ms / 1000
        # With a little more, a wait that ends then knows of the renewal that is just due.
        self.quiet_until = started + renewed[0].quiet_ms / 1000 + _SLACK * self._lease_seconds
        with self._mutex:
            for hold in holds:
                if hold.locks and hold.locks_expire_at > time.monotonic():
                    self._expire(hold, started + min(self._lease_seconds, self._ttl_seconds(hold.locks)))
        if self.dataset_id not in ("", dataset_id):
            logger.warning(
                "the server has lost data, or was restarted and may have; %d running tasks go on", len(holds)
            )
            with self._mutex:
                self._restored = {(hold.delivery.stream, hold.delivery.entry): hold for hold in holds}
        self.dataset_id = dataset_id
        for each in renewed:
            for hold in each.lost:
                self._report(hold, "another worker has it, or had it and has settled it", taken_over=True)
            if each.cancelled:
                self._loop.call_soon_threadsafe(self._cancelling.add, [hold.cancel for hold in each.cancelled])
            for hold, lock in each.lost_locks:
                self._report(hold, f"the lock {lock['key']} could not be renewed")
        if self._restored:
            self._settle_restored()

    def _settle_restored(self) -> None:
        """Settle once more what a settlement and a renewal after a loss of data have met in: the settlement came
        first, and the renewal noted as ours, and locked, what had just ended.
        """
        with self._mutex:
            over = {place: hold for place, hold in self._restored.items() if place not in self._holds}
        settlements = [Settlement(hold.delivery, hold.locks) for hold in over.values()]
        for portion in in_calls(settlements, _RENEW_BATCH, Settlement.bytes):
            worker_state.settle_now(self._redis, self._consumer, portion)
        for place in over:
            del self._restored[place]

    def _renew_some(self, holds: Sequence[Leased], complete: bool) -> _Renewed:
        entries: list[Entry] = [
            {"stream": h.delivery.stream, "entry": h.delivery.entry, "deliveries": h.delivery.deliveries}
            for h in holds
        ]
        locks = [(hold, lock) for hold in holds for lock in hold.locks]
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
            [holds[position] for position in lost_entries],
            [locks[position] for position in lost_locks],
            [holds[position] for position in cancelled],
            dataset_id,
            shortest_ms,
            quiet_ms,
        )

    def _report(self, hold: Leased, what: str, *, taken_over: bool = False) -> None:
        with self._mutex:
            place = hold.delivery.stream, hold.delivery.entry
            if self._holds.get(place) is not hold:
                return  # it was settled while we asked
            if taken_over:
                del self._holds[place]
            else:  # still ours to settle
                self._holds[place] = _WithoutLocks(hold)
        if hold.locks:
            hold.locks_expire_at = min(hold.locks_expire_at, time.monotonic())
        hold.mark_cancelled()
        self._loop.call_soon_threadsafe(hold.on_lease_lost, what, taken_over)
