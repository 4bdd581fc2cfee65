"""Clock of the Redis server, which all schedulers share, interpolated between two polls."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ..broker.inspection import server_time

if TYPE_CHECKING:
    from redis.asyncio import Redis


#: A clock that is set back by less is waited for: what has just run does not run again.
SET_BACK_SECONDS = 10.0


class ServerClock:
    """Time of the server without a round trip each time."""

    def __init__(self) -> None:
        self._ahead = 0.0
        """Offset of the server's Unix time to our monotonic clock (s)."""
        self._uncertain = float("inf")

    async def ask(self, redis: Redis) -> bool:
        """Poll the server's clock. Returns whether it was set back by more than it may be."""
        before = time.monotonic()
        server = await server_time(redis)
        after = time.monotonic()
        ahead = server - (before + after) / 2
        uncertain = (after - before) / 2
        # An answer that took its time says less than an earlier one, unless it contradicts that.
        if uncertain <= self._uncertain or abs(ahead - self._ahead) > uncertain:
            set_back = self._uncertain != float("inf") and self._ahead - ahead > SET_BACK_SECONDS
            self._ahead, self._uncertain = ahead, uncertain
            return set_back
        return False

    def now_ms(self) -> float:
        """Unix time of the server (ms)."""
        return (time.monotonic() + self._ahead) * 1000

    def monotonic_at(self, moment_ms: float) -> float:
        """Convert the time of the server to our monotonic clock."""
        return moment_ms / 1000 - self._ahead
