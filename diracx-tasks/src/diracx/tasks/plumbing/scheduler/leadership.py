"""Leader election: a lock with a short lease, whose token fences what only the leader may do."""

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

#: How often one that cannot hear of it looks whether the lead is free.
_LOOK_SECONDS = 0.4
#: How long after its end a lease is looked at.
_MARGIN_MS = 5


class Leadership:
    """Leadership as one scheduler takes, renews and releases it.

    Args:
        lease_seconds: how long the lead is kept without renewal.
    """

    def __init__(self, broker: RedisStreamBroker, lease_seconds: float) -> None:
        self._broker = broker
        self._lease_seconds = lease_seconds
        self.token = uuid4().hex
        """Known to nobody else."""
        self._lease_ms = int(lease_seconds * 1000)
        self.renew_at = 0.0
        """Time to renew the lease (monotonic clock): twice before it ends."""

    @property
    def renewal_due(self) -> bool:
        """Return whether it is time to renew the lease."""
        return self.renew_at <= time.monotonic()

    async def take(self) -> bool:
        """Take the leadership if it is free, or still ours."""
        self._renewed()
        await check_version(self._broker.redis)
        return await scheduling.take_lead(self._broker.redis, self.token, self._lease_ms)

    async def renew(self) -> bool:
        """Renew the leadership. False: it is lost."""
        self._renewed()
        await check_version(self._broker.redis)
        return await scheduling.renew_lead(self._broker.redis, self.token, self._lease_ms)

    def _renewed(self) -> None:
        self.renew_at = time.monotonic() + self._lease_seconds / 3

    async def free_in_seconds(self, *, heard: bool) -> float:
        """Return the time (s) until the leadership is free, unless it is renewed.

        A scheduler that does not hear of its release (`heard` is false) polls in between.
        """
        left_ms = await scheduling.lead_left_ms(self._broker.redis)
        seconds = (max(0, left_ms) + _MARGIN_MS) / 1000
        return seconds if heard else min(seconds, _LOOK_SECONDS)

    async def release(self) -> None:
        """Release the leadership, if it is ours, and notify the schedulers in standby."""
        try:
            await scheduling.release_lead(self._broker.redis, self.token, self._lease_ms)
        except RedisError as error:
            logger.warning("could not release the leadership: %s; the lease will end by itself", error)
