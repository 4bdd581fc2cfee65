"""Intake: bring messages to a worker that has room for them, and never more than that."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

from redis.exceptions import ResponseError

from .._util.retrying import reason, retry_until_available
from ..broker.models import Settlement
from ..broker.redis_streams import AUDIT_LEASES, is_poison_candidate
from .settlement import hand_back

if TYPE_CHECKING:
    from ..broker import RedisStreamBroker
    from ..broker.models import Delivery
    from ..broker.requests import LockSpec
    from .settings import WorkerSettings
    from .unread import UnreadGuard


logger = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")
_Deliveries = TypeVar("_Deliveries", bound="Sequence[Delivery]")

_LONGEST_WAIT_SECONDS = 20.0
#: The part of the time after which a connection counts as dead that a wait may take.
_PART_OF_PATIENCE = 2 / 3
#: Messages in one call: while they begin, the server has the next ones ready.
_BATCH = 50
#: Messages that an idle worker takes the moment they come; the others stay for the next that asks.
_AT_ONCE = 10
#: What the dead have left is looked at so often, as far as nobody could take it.
_LEFT_OVER_SECONDS = 1.0
#: What was reserved while we waited was so short a time before its answer is read.
_ANSWER_SECONDS = 1.0
#: How long a stopping worker asks the server to end its wait.
_END_WAIT_SECONDS = 2.0


class Intake:
    """Asks the broker for work and, now and then, does the housekeeping that keeps work coming.

    Args:
        held: stream and entry of what the worker has in hand.
        is_idle: whether nothing runs, so that nothing can block the event loop.
        held_locks: the locks of what it has in hand; None keeps whatever the server takes for ours.
        quiet_until: before that (`time.monotonic`) no worker's lease ends, as far as the lease keeper knows.
        unread: hands back what comes while what runs blocks the event loop.
    """

    def __init__(
        self,
        broker: RedisStreamBroker,
        settings: WorkerSettings,
        stop: asyncio.Event,
        held: Callable[[], Iterable[tuple[str, str]]],
        is_idle: Callable[[], bool],
        held_locks: Callable[[], Iterable[LockSpec] | None] = lambda: None,
        quiet_until: Callable[[], float] = lambda: 0.0,
        unread: UnreadGuard | None = None,
    ) -> None:
        self._broker = broker
        self._held = held
        self._held_locks = held_locks
        self._quiet_until = quiet_until
        self._unread = unread
        self._nothing_left = False
        """True if the dead have left nothing, so that nobody has to look before the next lease ends."""
        self._is_idle = is_idle
        self._answer_lost = False
        self._reconnects = broker.reconnects
        self._stop = stop
        self._closed = asyncio.Event()
        self._settings = settings
        self._stops: asyncio.Task[Literal[True]] | None = None
        self._wait: asyncio.Timeout | None = None
        self._candidates: set[tuple[str, str]] = set()
        """Stream and entry of those in hand: while there is one, we take nothing else."""
        self._draining = False
        """True if we take nothing until our hands are empty, so that a poison candidate finds them so."""
        self._last_ids: list[str] | None = None
        """Of each stream, an entry up to which all has been delivered; None: to look into all of them."""
        self._all_seen = False
        """True if there was nothing after those."""
        self._longest_wait = min(_LONGEST_WAIT_SECONDS, broker.patience_seconds * _PART_OF_PATIENCE)
        # Over before the lease could be, which has two thirds left at least: should we die meanwhile, what we are
        # given is taken over when it ends.
        self._longest_reservation = min(self._longest_wait, 0.6 * settings.lease_seconds)
        self._reclaim_at = 0.0
        self._audit_at = 0.0
        self._recover_at = math.inf
        """End on the server of a wait that we have left: it may not know that nobody listens."""
        self.reserved_after = 0.0
        """Moment (`time.monotonic`) after which the tasks that were returned last were reserved."""

    async def next(self, free: int) -> list[Delivery]:
        """Up to `free` messages; an empty list when nothing came for a while.

        A call that fails may have reserved messages all the same; the next one finds them. When the worker stops,
        drop what is returned: `close` and `recover` find it.
        """
        self.reserved_after = time.monotonic()
        if self._candidates:
            self._let_go(self._candidates.difference(self._held()))  # it may have been parked
        if self._recover_at <= self.reserved_after or self._reconnects != self._broker.reconnects:
            # After a failover, the new primary may have missed settlements that the old one has confirmed.
            self._recover_at, self._reconnects, self._answer_lost = math.inf, self._broker.reconnects, True
        if self._answer_lost and (recovered := await self.recover()):
            return await self._as_many_as(free, recovered)
        self._answer_lost = True
        try:
            deliveries = await self._as_many_as(free, await self._look(free))
        except BaseException:
            self._last_ids = None  # another server may answer next time
            self._leave_wait()
            raise
        self._answer_lost = False
        return deliveries

    async def close(self) -> None:
        """End the wait on the server, which gives us nothing more. Without an answer, give up after some time."""
        try:
            async with asyncio.timeout(_END_WAIT_SECONDS):
                await retry_until_available(self._broker.end_wait, "end the wait for tasks")
        except Exception as error:
            logger.warning("stopping with a wait for tasks that may go on: %s", reason(error))
        finally:
            self._closed.set()

    async def closed_if_stopping(self) -> None:
        """Return when nothing that is handed back can come back to us by our own wait, because we stop."""
        if self._stop.is_set():
            await self._closed.wait()

    async def recover(self) -> list[Delivery]:
        """Return what is reserved for us and not held."""
        return self._watched(await self._broker.recover(self._held(), self._held_locks()))

    async def _as_many_as(self, free: int, deliveries: list[Delivery]) -> list[Delivery]:
        """The first of them; the others are handed back, but for those that cannot run anyway. A poison candidate
        that comes through a queue and would not be alone is set aside for a worker that holds nothing else.
        """
        if self._stop.is_set():
            return deliveries
        if self._broker.reconnects:  # a server that has gone back to earlier data hands out again what runs here
            held = set(self._held())
            deliveries = [d for d in deliveries if d.deliveries > 1 or (d.stream, d.entry) not in held]
        settlements = [hand_back(delivery) for delivery in deliveries[free:] if delivery.data is not None]
        if not self._is_idle() or len(deliveries) > 1:
            most, new = self._settings.max_deliveries, [each for each in deliveries[:free] if each.deliveries == 1]
            settlements += [Settlement(each, aside=True) for each in new if is_poison_candidate(each, most)]
        if settlements:
            await self._broker.settle(settlements)
        others = [settlement.delivery for settlement in settlements]
        return [delivery for delivery in deliveries if delivery not in others]

    def settled(self, deliveries: Iterable[Delivery]) -> None:
        """Note settled deliveries: look at once for a candidate, if it is one's turn now."""
        if self._candidates:
            self._let_go({(delivery.stream, delivery.entry) for delivery in deliveries})
        elif self._draining and not any(True for _ in self._held()):
            self.look_at_once()

    def _let_go(self, places: set[tuple[str, str]]) -> None:
        if not self._candidates.isdisjoint(places):
            self._candidates -= places
            self.look_at_once()

    def look_at_once(self) -> None:
        """Look for dead workers now, whatever is waited for."""
        self._reclaim_at, self._nothing_left = 0.0, False
        self._interrupt()

    async def _look(self, free: int) -> list[Delivery]:
        if reclaimed := await self._reclaim(free):
            return reclaimed
        if self._candidates or self._draining:  # what dies with us now, dies of it
            await asyncio.sleep(0)
            await self._unless_stopped(asyncio.sleep(self._timeout()))
            return []
        if self._last_ids is None or not self._all_seen:
            deliveries = await self._fetch(min(free, _BATCH))
            if deliveries:
                return deliveries
        assert self._last_ids is not None
        await asyncio.sleep(0)  # what has just been started may have ended after that
        if self._stop.is_set():
            return []
        if self._unread is None or self._is_idle():
            return await self._reserve_next(free)
        try:
            deliveries = await self._reserve_next(free, self._unread.expect)
        finally:
            handed_back = await self._unread.read()
        return await self.recover() if handed_back else deliveries

    async def _fetch(self, asked: int) -> list[Delivery]:
        deliveries, last_ids = await self._broker.fetch(
            asked, lease_seconds=self._settings.lease_seconds, last_ids=self._last_ids or ()
        )
        self._note(deliveries)
        self._all_seen = len(deliveries) < asked
        if not deliveries:
            self._last_ids = last_ids
        return deliveries

    async def _reserve_next(self, free: int, sent: Callable[[int], None] = lambda socket: None) -> list[Delivery]:
        """Reserve the next tasks of the queues."""
        timeout = min(self._timeout(), self._longest_reservation)
        asked = min(free, _AT_ONCE)
        try:
            found = await self._unless_stopped(self._broker.reserve_next(asked, timeout, sent))
        except ResponseError as error:
            if not str(error).startswith(("NOGROUP", "UNBLOCKED")):
                raise
            # The streams are gone, and a fetch makes them anew; or the server is the primary no more, and what we
            # have settled there lately may be ours again on the next one.
            self._last_ids = None
            return await self.recover()
        if found is None:
            self._leave_wait()
            return [] if self._stop.is_set() else await self.recover()
        deliveries, may_be_cancelled = found
        if not deliveries:
            return []
        self.reserved_after = max(self.reserved_after, time.monotonic() - _ANSWER_SECONDS)
        # With fewer slots than streams, look before the next wait: it may be given one of each.
        self._all_seen = len(deliveries) < asked and free >= len(self._broker.streams)
        self._note(deliveries)
        return await self.recover() if may_be_cancelled else deliveries

    def _timeout(self) -> float:
        """Time to wait (s) before others' leases, or what a wait that we left was given, are polled."""
        return min(max(min(self._reclaim_at, self._recover_at) - time.monotonic(), 0.001), self._longest_wait)

    def _leave_wait(self) -> None:
        # A proxy between us may keep the server's connection open when ours is gone.
        self._recover_at = time.monotonic() + self._longest_reservation + _ANSWER_SECONDS

    def _note(self, deliveries: Sequence[Delivery]) -> None:
        """Note the entries after which to wait."""
        if any(delivery.earlier_redeliveries for delivery in deliveries):
            self._watched(deliveries)
        if self._last_ids is not None:
            for delivery in deliveries:
                self._last_ids[self._broker.streams.index(delivery.stream)] = delivery.entry

    async def _unless_stopped(self, waiting: Awaitable[_Answer]) -> _Answer | None:
        """Wait for the answer; None if the worker stops, or is to look again at once, before it comes."""
        if self._stops is None:
            self._stops = asyncio.create_task(self._stop.wait())
            self._stops.add_done_callback(lambda _: self._interrupt())
        try:
            # No task of its own for the wait: what comes is to begin in the same round of the event loop.
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

    def _watched(self, deliveries: _Deliveries) -> _Deliveries:
        """Note the candidates among these deliveries, and return all."""
        for delivery in deliveries:
            if is_poison_candidate(delivery, self._settings.max_deliveries):
                self._candidates.add((delivery.stream, delivery.entry))
        return deliveries

    async def _reclaim(self, free: int) -> list[Delivery]:
        """Take over from dead workers, at the moment when the next lease ends."""
        now = time.monotonic()
        if self._nothing_left:
            self._reclaim_at = min(max(self._reclaim_at, self._quiet_until()), self._audit_at)
        if now < self._reclaim_at:
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
        self._reclaim_at = min(now + again_seconds, self._audit_at)
        self._nothing_left = again_seconds > _LEFT_OVER_SECONDS
        if audit and not deliveries and not first:  # what the server takes for ours: a failover may go unnoticed
            return await self.recover()
        return self._watched(deliveries)
