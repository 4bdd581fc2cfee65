"""The server's clock, which all schedulers share, read between two looks at it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from redis.asyncio import Redis


class ServerClock:
    """Tells the server's time without asking for it each time."""

    def __init__(self) -> None:
        self._ahead = 0.0
        """Seconds since the epoch at the server, less our monotonic clock."""
        self._uncertain = float("inf")

    async def ask(self, redis: Redis) -> None:
        """Set the clock."""
        before = time.monotonic()
        seconds, microseconds = await redis.execute_command("TIME")
        after = time.monotonic()
        ahead = int(seconds) + int(microseconds) / 1e6 - (before + after) / 2
        uncertain = (after - before) / 2
        # An answer that took its time says less than an earlier one, unless it contradicts that.
        if uncertain <= self._uncertain or abs(ahead - self._ahead) > uncertain:
            self._ahead, self._uncertain = ahead, uncertain

    def now_ms(self) -> float:
        """Milliseconds since the epoch."""
        return (time.monotonic() + self._ahead) * 1000

    def monotonic_at(self, moment_ms: float) -> float:
        """What our monotonic clock shows then."""
        return moment_ms / 1000 - self._ahead
