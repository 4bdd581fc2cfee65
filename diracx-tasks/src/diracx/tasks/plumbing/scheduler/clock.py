"""Clock of the Redis server, which all schedulers share, interpolated between two polls."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ..broker.inspection import server_time

if TYPE_CHECKING:
    from redis.asyncio import Redis


#: After a clock was set back by less, the scheduler waits, and nothing runs twice; else it plans again.
SET_BACK_SECONDS = 10.0


class ServerClock:
    """Time of the server without a round trip each time."""

    def __init__(self) -> None:
        self.ahead = 0.0
        """Offset of the server's Unix time to the local monotonic clock (s)."""
        self._uncertain = float("inf")

    async def poll(self, redis: Redis) -> bool:
        """Poll the server's clock. Returns True if it was set back by more than `SET_BACK_SECONDS`."""
        before = time.monotonic()
        server = await server_time(redis)
        after = time.monotonic()
        ahead = server - (before + after) / 2
        uncertain = (after - before) / 2
        # A slow reply is less exact than an earlier fast one, and is ignored unless it contradicts that.
        if uncertain <= self._uncertain or abs(ahead - self.ahead) > uncertain:
            set_back = self._uncertain != float("inf") and self.ahead - ahead > SET_BACK_SECONDS
            self.ahead, self._uncertain = ahead, uncertain
            return set_back
        return False

    def now_ms(self) -> float:
        """Unix time of the server (ms)."""
        return (time.monotonic() + self.ahead) * 1000

    def monotonic_at(self, moment_ms: float) -> float:
        """Convert a time of the server (ms) to the local monotonic clock."""
        return moment_ms / 1000 - self.ahead
