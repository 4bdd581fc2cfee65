"""Intake: fetches deliveries for the free slots of a worker, and never more."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeVar

from redis.exceptions import RedisError, ResponseError

from .._util.retrying import reason, retry_until_available
from ..broker.lease_audit import AUDIT_LEASES
from ..broker.models import Settlement, is_poison_candidate
from .settlement import requeue

if TYPE_CHECKING:
    from ..broker import RedisStreamBroker
    from ..broker.models import Delivery, SettlingCall
    from ..broker.redis_streams import FetchReply
    from ..broker.requests import LockSpec
    from .settings import WorkerSettings
    from .unread import UnreadGuard


logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")
_Deliveries = TypeVar("_Deliveries", bound="Sequence[Delivery]")

_LONGEST_WAIT_SECONDS = 20.0
#: The longest blocking read, as a part of the timeout of a connection.
_PART_OF_TIMEOUT = 2 / 3
#: Messages in one call; while the worker starts them, the server prepares the next batch.
_BATCH = 50
#: Messages that an idle worker takes with one blocking read; the others stay for other workers.
_AT_ONCE = 10
#: Interval between reclaims while entries of dead workers are left that no worker could take.
_LEFT_OVER_SECONDS = 1.0
#: The longest time between a reservation by a blocking read and the reading of its reply.
_REPLY_SECONDS = 1.0
#: How long settlements wait for the reply to a fetch, to be sent with the next one.
_FETCH_SECONDS = 0.005
#: Timeout of a stopping worker's call that ends its blocking read.
_END_WAIT_SECONDS = 2.0


class HeldDeliveries(Protocol):
    """Deliveries and locks that the worker holds; implemented by the lease keeper."""

    quiet_until: float
    """Time (`time.monotonic`) before which no worker's lease ends."""

    def held(self) -> Collection[tuple[str, str]]:
        """Stream and entry of each delivery."""

    def held_locks(self) -> Collection[LockSpec] | None:
        """The locks; None keeps all locks that the server has recorded for this worker."""


class UnsentSettlements(Protocol):
    """Settlements that wait to be sent; implemented by the settler."""

    def take(self) -> SettlingCall | None:
        """Take them, to send them with another call; None without any."""

    def return_unsent(self) -> None:
        """Send those that were taken and have no reply."""


class _SentFetch(NamedTuple):
    """A fetch whose reply is not read."""

    at_most: int
    at: float
    """Time (`time.monotonic`) before it was sent."""
    reply: FetchReply
    unsent: UnsentSettlements | None
    """Source of the settlements that were sent with it."""


class Intake:
    """Fetches deliveries from the broker, and reclaims those of dead workers.

    Args:
        held: the deliveries that the worker holds.
        running: the running executions, a live view; while it is empty, nothing can block the event loop.
        unread: requeues deliveries that arrive while a task blocks the event loop.
    """

    def __init__(
        self,
        broker: RedisStreamBroker,
        settings: WorkerSettings,
        stop: asyncio.Event,
        held: HeldDeliveries,
        running: Collection[object],
        unread: UnreadGuard | None = None,
    ) -> None:
        self._broker = broker
        self._held = held
        self._running = running
        self._unread = unread
        self._nothing_left = False
        """True if dead workers have left no entries, so that the next reclaim can wait for the end of a lease."""
        self._reply_lost = False
        self._reconnects = broker.reconnects
        self._stop = stop
        self._closed = asyncio.Event()
        self._fetched = asyncio.Event()
        self._fetched.set()
        self._settings = settings
        self._sent: _SentFetch | None = None
        """The fetch whose reply is not read."""
        self._stops: asyncio.Task[Literal[True]] | None = None
        self._wait: asyncio.Timeout | None = None
        self._candidates: set[tuple[str, str]] = set()
        """Stream and entry of the poison candidates that are held: while there is one, nothing else is taken."""
        self._draining = False
        """True if nothing is taken until all running tasks have ended, so that a poison candidate runs alone."""
        self._last_ids: list[str] | None = None
        """For each stream, an entry id up to which all is delivered; None: unknown, so fetch from all of them."""
        self._all_seen = False
        """True if the streams had no entries after `_last_ids`."""
        self._longest_wait = min(_LONGEST_WAIT_SECONDS, broker.reply_timeout_seconds * _PART_OF_TIMEOUT)
        # Shorter than the rest of the lease, which is two thirds at least: should the worker die while it waits,
        # other workers reclaim the reserved entries when the lease ends.
        self._longest_reservation = min(self._longest_wait, 0.6 * settings.lease_seconds)
        self.reclaim_at = 0.0
        """Time (`time.monotonic`) of the next reclaim from dead workers."""
        self._audit_at = 0.0
        self._refetch_at = math.inf
        """End of an abandoned blocking read on the server; until then it may still reserve entries."""
        self.reserved_after = 0.0
        """Time (`time.monotonic`) after which the deliveries returned last were reserved."""

    async def next(self, free: int, unsent: UnsentSettlements | None = None) -> list[Delivery]:
        """Return up to `free` deliveries; an empty list when none arrived within the wait. Unsent settlements may
        be sent with the call.

        A call that fails may have reserved deliveries; the next call fetches them again. When the worker stops,
        ignore the returned deliveries: `fetch_unacknowledged` returns them again.
        """
        self.reserved_after = self.reserves_since()
        if self._candidates:
            self._remove_candidates(self._candidates.difference(self._held.held()))  # it may have been parked
        ahead = [] if self._sent is None else await self._read_fetch()
        if self._refetch_at <= self.reserved_after or self._reconnects != self._broker.reconnects:
            # After a failover, the new primary may lack settlements that the old one has confirmed.
            self._refetch_at, self._reconnects, self._reply_lost = math.inf, self._broker.reconnects, True
        if self._reply_lost:
            if deliveries := await self.fetch_unacknowledged():  # those fetched ahead are among them
                return await self._limit_to(free, deliveries)
            ahead = []
        self._reply_lost = True
        try:
            deliveries = await self._limit_to(free, ahead or await self._poll(free, unsent))
        except BaseException:
            self._note_lost_reply()
            raise
        self._reply_lost = False
        await self._fetch_ahead(free - len(deliveries), unsent)
        return deliveries

    def reserves_since(self) -> float:
        """Time (`time.monotonic`) before the deliveries that `next` would return now are reserved."""
        return time.monotonic() if self._sent is None else self._sent.at

    @property
    def fetches_ahead(self) -> bool:
        """True if the next fetch is sent already."""
        return self._sent is not None

    async def _fetch_ahead(self, free: int, unsent: UnsentSettlements | None) -> None:
        """With a backlog and free slots, send the next fetch: the server replies while the worker starts what it
        has.
        """
        if free <= 0 or self._all_seen or self._candidates or self._draining or self._stop.is_set():
            return
        if time.monotonic() < self.reclaim_at:
            with suppress(RedisError, OSError):  # the next call meets the same error
                await self._send_fetch(min(free, _BATCH), unsent)

    async def close(self) -> None:
        """End the blocking read on the server, so that it reserves nothing more; give up after a timeout."""
        try:
            async with asyncio.timeout(_END_WAIT_SECONDS):
                if self._sent is not None:
                    with suppress(RedisError):
                        await self._read_fetch()  # `fetch_unacknowledged` will return its deliveries
                await retry_until_available(self._broker.end_wait, "end the wait for tasks")
        except Exception as error:
            logger.warning("stopping with a wait for tasks that may go on: %s", reason(error))
        finally:
            self._closed.set()

    async def wait_for_fetch(self) -> None:
        """Wait for the reply to a fetch, but not for long: the next call may take unsent settlements along."""
        if not self._fetched.is_set():
            long_enough = asyncio.get_running_loop().call_later(_FETCH_SECONDS, self._fetched.set)
            await self._fetched.wait()
            long_enough.cancel()

    async def closed_if_stopping(self) -> None:
        """Wait for `close` when the worker stops, or its own blocking read could get what it requeues."""
        if self._stop.is_set():
            await self._closed.wait()

    async def fetch_unacknowledged(self) -> list[Delivery]:
        """Return deliveries that are reserved for the worker and not held."""
        deliveries = await self._broker.fetch_unacknowledged(self._held.held(), self._held.held_locks())
        return self._note_candidates(deliveries)

    async def _limit_to(self, free: int, deliveries: list[Delivery]) -> list[Delivery]:
        """Keep the first `free` deliveries and requeue the others, but for unreadable ones. A poison candidate
        from a queue that would not run alone is set aside for a worker that holds nothing else.
        """
        if self._stop.is_set():
            return deliveries
        if self._broker.reconnects:  # a server restored to earlier data may deliver again what runs here
            held = set(self._held.held())
            deliveries = [d for d in deliveries if d.deliveries > 1 or (d.stream, d.entry) not in held]
        settlements = [requeue(delivery) for delivery in deliveries[free:] if delivery.data is not None]
        if self._running or len(deliveries) > 1:
            limit = self._settings.max_deliveries
            new = [each for each in deliveries[:free] if each.deliveries == 1 and each.earlier_redeliveries]
            settlements += [Settlement(each, isolate=True) for each in new if is_poison_candidate(each, limit)]
        if settlements:
            await self._broker.settle(settlements)
            settled = [settlement.delivery for settlement in settlements]
            return [delivery for delivery in deliveries if delivery not in settled]
        return deliveries

    def settled(self, deliveries: Iterable[Delivery]) -> None:
        """Note settled deliveries, and poll at once if a poison candidate was among them or can start now."""
        if self._candidates:
            self._remove_candidates({(delivery.stream, delivery.entry) for delivery in deliveries})
        elif self._draining and not self._held.held():
            self.poll_now()

    def _remove_candidates(self, entries: set[tuple[str, str]]) -> None:
        if not self._candidates.isdisjoint(entries):
            self._candidates -= entries
            self.poll_now()

    def poll_now(self) -> None:
        """Interrupt the wait and reclaim from dead workers now."""
        self.reclaim_at, self._nothing_left = 0.0, False
        self._interrupt()

    async def _poll(self, free: int, unsent: UnsentSettlements | None) -> list[Delivery]:
        if reclaimed := await self._reclaim(free):
            return reclaimed
        if self._candidates or self._draining:  # should the worker die now, only the candidate counts as the cause
            await asyncio.sleep(0)
            await self._unless_stopped(asyncio.sleep(self._timeout()))
            return []
        if self._last_ids is None or not self._all_seen:
            await self._send_fetch(min(free, _BATCH), unsent)
            if deliveries := await self._read_fetch():
                return deliveries
        assert self._last_ids is not None
        await asyncio.sleep(0)  # an execution that has just started may end in this round of the event loop
        if self._stop.is_set():
            return []
        if self._unread is None or not self._running:
            return await self._reserve_next(free, unsent=unsent)
        try:
            deliveries = await self._reserve_next(free, self._unread.expect)
        finally:
            requeued = await self._unread.read()
        return await self.fetch_unacknowledged() if requeued else deliveries

    async def _send_fetch(self, at_most: int, unsent: UnsentSettlements | None) -> None:
        """Send a fetch, whose deliveries `_read_fetch` returns."""
        if self._stop.is_set():
            unsent = None  # a worker that stops has to send them alone
        at = time.monotonic()
        self._fetched.clear()
        try:
            reply = await self._broker.send_fetch(
                at_most,
                lease_seconds=self._settings.lease_seconds,
                last_ids=self._last_ids or (),
                settling=None if unsent is None else unsent.take(),
            )
        except BaseException:
            self._note_lost_reply()
            self._end_fetch(unsent)
            raise
        self._sent = _SentFetch(at_most, at, reply, unsent)

    async def _read_fetch(self) -> list[Delivery]:
        sent, self._sent = self._sent, None
        assert sent is not None
        try:
            deliveries, last_ids = await sent.reply()
        except BaseException:
            self._note_lost_reply()
            raise
        finally:
            self._end_fetch(sent.unsent)
        self._note_delivered(deliveries)
        self._all_seen = len(deliveries) < sent.at_most
        if not deliveries:
            self._last_ids = last_ids
        return deliveries

    def _note_lost_reply(self) -> None:
        self._reply_lost, self._last_ids = True, None  # another server may reply to the next call
        self._abandon_wait()

    def _end_fetch(self, unsent: UnsentSettlements | None) -> None:
        self._fetched.set()
        if unsent is not None:
            unsent.return_unsent()

    async def _reserve_next(
        self,
        free: int,
        sent: Callable[[int], None] | None = None,
        unsent: UnsentSettlements | None = None,
    ) -> list[Delivery]:
        """Reserve the next tasks of the queues with a blocking read.

        Settlements go in the same write, before it: if they grant a lock to a waiting task, it is read at once.
        """
        timeout = min(self._timeout(), self._longest_reservation)
        at_most = min(free, _AT_ONCE)
        try:
            with self._take_unsent(unsent) as settling:
                found = await self._unless_stopped(self._broker.reserve_next(at_most, timeout, sent, settling))
        except ResponseError as error:
            if not str(error).startswith(("NOGROUP", "UNBLOCKED")):
                raise
            # Either the streams were deleted, and a fetch makes them again; or the server is no longer the
            # primary, and entries settled there lately may still be reserved for this worker on the new one.
            self._last_ids = None
            return await self.fetch_unacknowledged()
        if found is None:
            self._abandon_wait()
            return [] if self._stop.is_set() else await self.fetch_unacknowledged()
        deliveries, may_be_cancelled = found
        if not deliveries:
            return []
        self.reserved_after = max(self.reserved_after, time.monotonic() - _REPLY_SECONDS)
        # With fewer slots than streams, fetch before the next wait, which may return one entry of each stream.
        self._all_seen = len(deliveries) < at_most and free >= len(self._broker.streams)
        self._note_delivered(deliveries)
        return await self.fetch_unacknowledged() if may_be_cancelled else deliveries

    @contextmanager
    def _take_unsent(self, unsent: UnsentSettlements | None) -> Iterator[SettlingCall | None]:
        """Unsent settlements, to be sent by a call of this block; a worker that stops has to send them alone."""
        if unsent is None or self._stop.is_set():
            yield None
            return
        try:
            yield unsent.take()
        finally:
            unsent.return_unsent()

    def _timeout(self) -> float:
        """Time to wait (s) until the next reclaim, or until an abandoned blocking read has ended on the server."""
        return min(max(min(self.reclaim_at, self._refetch_at) - time.monotonic(), 0.001), self._longest_wait)

    def _abandon_wait(self) -> None:
        # A proxy may keep its connection to the server open after the worker's connection is closed.
        self._refetch_at = time.monotonic() + self._longest_reservation + _REPLY_SECONDS

    def _note_delivered(self, deliveries: Sequence[Delivery]) -> None:
        """Advance `_last_ids` past these deliveries."""
        if any(delivery.earlier_redeliveries for delivery in deliveries):
            self._note_candidates(deliveries)
        if self._last_ids is not None:
            for delivery in deliveries:
                self._last_ids[self._broker.streams.index(delivery.stream)] = delivery.entry

    async def _unless_stopped(self, waiting: Awaitable[_Result]) -> _Result | None:
        """Wait for the result; None if the worker stops or `poll_now` is called before it arrives."""
        if self._stops is None:
            self._stops = asyncio.create_task(self._stop.wait())
            self._stops.add_done_callback(lambda _: self._interrupt())
        try:
            # No asyncio task for the wait: a delivery must start in the same round of the event loop.
            async with asyncio.timeout(0 if self._stop.is_set() else None) as wait:
                self._wait = wait
                return await waiting
        except TimeoutError:
            if not wait.expired():
                raise
            return None
        finally:
            self._wait = None

    def _interrupt(self) -> None:
        if self._wait is not None and not self._wait.expired():
            self._wait.reschedule(0)

    def _note_candidates(self, deliveries: _Deliveries) -> _Deliveries:
        """Note the poison candidates among these deliveries, and return all."""
        for delivery in deliveries:
            if is_poison_candidate(delivery, self._settings.max_deliveries):
                self._candidates.add((delivery.stream, delivery.entry))
        return deliveries

    async def _reclaim(self, free: int) -> list[Delivery]:
        """Reclaim entries of dead workers, if a lease may have ended."""
        now = time.monotonic()
        if self._nothing_left:
            self.reclaim_at = min(max(self.reclaim_at, self._held.quiet_until), self._audit_at)
        if now < self.reclaim_at:
            return []
        lease_seconds = self._settings.lease_seconds
        first, audit = not self._audit_at, now >= self._audit_at
        if audit:
            self._audit_at = now + AUDIT_LEASES * lease_seconds
        deliveries, again_seconds, self._draining = await self._broker.reclaim(
            min(free, _BATCH),
            audit=audit,
            lease_seconds=lease_seconds,
            max_deliveries=self._settings.max_deliveries,
        )
        self.reclaim_at = min(now + again_seconds, self._audit_at)
        self._nothing_left = again_seconds > _LEFT_OVER_SECONDS
        if audit and not deliveries and not first:  # compare with the server: a failover may go unnoticed
            return await self.fetch_unacknowledged()
        return self._note_candidates(deliveries)
