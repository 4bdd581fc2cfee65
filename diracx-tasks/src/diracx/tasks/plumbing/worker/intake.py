"""Intake: bring messages to a worker that has room for them, and never more than that."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ..broker.redis_streams import SUSPECT_FROM

if TYPE_CHECKING:
    from ..broker import RedisStreamBroker
    from ..broker.models import Delivery
    from .settings import WorkerSettings


#: How often a worker looks for consumers that are on no list: only a list that was lost has left some.
_AUDIT_LEASES = 4


#: Shorter than the time after which a connection counts as dead.
_LONGEST_WAIT_SECONDS = 20.0
_CANCEL_AGAIN_SECONDS = 0.1


class Intake:
    """Asks the broker for work and, now and then, does the housekeeping that keeps work coming."""

    def __init__(
        self,
        broker: RedisStreamBroker,
        settings: WorkerSettings,
        stop: asyncio.Event,
        held: Callable[[], Iterable[tuple[str, str]]],
    ) -> None:
        self._broker = broker
        self._held = held
        self._answer_lost = False
        self._stop = stop
        self._settings = settings
        self._stops: asyncio.Future[bool] | None = None
        self._empty_since: list[str] | None = None
        """The last id of each stream, when there was nothing to fetch after it."""
        self._promote_at = 0.0
        self._reclaim_at = 0.0
        self._audit_at = 0.0

    async def next(self, free: int) -> list[Delivery]:
        """Up to `free` messages; an empty list when nothing came for a while, or when the worker stops.

        A call that fails may have reserved messages all the same; the next one finds them.
        """
        if self._answer_lost and (recovered := await self._broker.recover(self._held())):
            return recovered
        self._answer_lost = True
        try:
            deliveries = await self._look(free)
        except BaseException:
            self._empty_since = None  # another server may answer next time
            raise
        self._answer_lost = False
        return deliveries

    async def _look(self, free: int) -> list[Delivery]:
        await self._promote()
        if reclaimed := await self._reclaim(free):
            return reclaimed
        if self._empty_since is None:
            deliveries, last_ids = await self._broker.fetch(free, lease_seconds=self._settings.lease_seconds)
            if deliveries:
                return deliveries
            self._empty_since = last_ids
        timeout = min(self._promote_at, self._reclaim_at) - time.monotonic()
        timeout = min(max(timeout, 0.001), _LONGEST_WAIT_SECONDS)
        if await self._something_new(self._empty_since, timeout):
            self._empty_since = None
        return []

    async def _something_new(self, last_ids: list[str], timeout: float) -> bool:
        """Wait for it. Only this call, which reserves nothing, may be interrupted by a stop."""
        waits = asyncio.ensure_future(self._broker.wait(last_ids, timeout))
        stops = self._stops = self._stops or asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait([waits, stops], return_when=asyncio.FIRST_COMPLETED)
            return waits.done() and waits.result()
        finally:
            while not waits.done():
                # More than once if need be: asyncio.wait_for, inside the client, can lose a cancellation.
                waits.cancel()
                await asyncio.wait([waits], timeout=_CANCEL_AGAIN_SECONDS)
            if not waits.cancelled():
                waits.exception()  # it has been raised above, or came too late to matter

    async def _promote(self) -> None:
        """Move what is due into the queues, should no scheduler do it."""
        now = time.monotonic()
        if now < self._promote_at:
            return
        self._promote_at = now + self._settings.housekeeping_seconds
        next_due_ms = await self._broker.promote()
        if next_due_ms is not None:
            self._promote_at = min(self._promote_at, now + next_due_ms / 1000)

    async def _reclaim(self, free: int) -> list[Delivery]:
        """Take over from dead workers, at the moment when the next lease ends."""
        now = time.monotonic()
        if now < self._reclaim_at:
            return []
        lease_seconds = self._settings.lease_seconds
        audit = now >= self._audit_at
        if audit:
            self._audit_at = now + _AUDIT_LEASES * lease_seconds
        # The last chance of a message at the latest, or it would be buried for what its neighbour has done.
        suspect_from = min(SUSPECT_FROM, self._settings.max_deliveries)
        deliveries, again_seconds = await self._broker.reclaim(
            free, audit=audit, lease_seconds=lease_seconds, suspect_from=suspect_from
        )
        self._reclaim_at = min(now + again_seconds, self._audit_at)
        if audit:
            self._empty_since = None  # now and then, whatever was seen before
        return deliveries
