"""Leader election: a lock with a short lease, whose token fences the actions of the leader."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING
from uuid import uuid4

from redis.exceptions import RedisError

from ..broker import scheduling
from ..broker.schema_version import check_version

if TYPE_CHECKING:
    from ..broker import RedisStreamBroker

logger = logging.getLogger(__name__)

#: Interval of polls for a free leadership by schedulers that get no notice of its release.
_POLL_SECONDS = 0.4
#: Time after the end of the leader's lease at which it is polled.
_MARGIN_MS = 5


class Leadership:
    """Takes, renews and releases the leadership for one scheduler.

    Args:
        lease_seconds: lease of the leadership.
    """

    def __init__(self, broker: RedisStreamBroker, lease_seconds: float) -> None:
        self._broker = broker
        self._lease_seconds = lease_seconds
        self.token = uuid4().hex
        """Secret token that identifies this scheduler."""
        self._lease_ms = int(lease_seconds * 1000)
        self.renew_at = 0.0
        """Time of the next renewal (monotonic clock): after a third of the lease."""

    @property
    def renewal_due(self) -> bool:
        """True if it is time to renew the lease."""
        return self.renew_at <= time.monotonic()

    async def take(self) -> bool:
        """Take the leadership if it is free, or still held. False: another scheduler leads."""
        await self._begin_term()
        return await scheduling.take_lead(self._broker.redis, self.token, self._lease_ms)

    async def renew(self) -> bool:
        """Renew the leadership. False: it is lost."""
        await self._begin_term()
        return await scheduling.renew_lead(self._broker.redis, self.token, self._lease_ms)

    async def _begin_term(self) -> None:
        self.renew_at = time.monotonic() + self._lease_seconds / 3
        await check_version(self._broker.redis)

    async def free_in_seconds(self, *, notified: bool) -> float:
        """Return the time (s) until the leadership is free, unless it is renewed.

        Args:
            notified: the scheduler gets notices of a release; otherwise the time is limited to the poll interval.
        """
        left_ms = await scheduling.lead_left_ms(self._broker.redis)
        seconds = (max(0, left_ms) + _MARGIN_MS) / 1000
        return seconds if notified else min(seconds, _POLL_SECONDS)

    async def release(self) -> None:
        """Release the leadership, if it is held, and notify the schedulers in standby."""
        try:
            await scheduling.release_lead(self._broker.redis, self.token, self._lease_ms)
        except RedisError as error:
            logger.warning("could not release the leadership: %s; the lease will end by itself", error)
