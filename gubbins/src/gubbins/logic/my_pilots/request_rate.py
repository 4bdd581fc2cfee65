"""Limits of the requests of pilots, in each process of the application."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from gubbins.domain.exceptions import TooManyReportsError

_WINDOW_SECONDS = 60.0
#: Keys of which is known what they have done; of more, the least recent are forgotten.
_MOST_KEYS = 20_000


class RequestRate:
    """Sliding windows of a minute, one per key.

    Args:
        whose: what a key is, for the message.
        per_minute: the limit.
    """

    def __init__(self, whose: str, per_minute: int) -> None:
        self.whose = whose
        self.per_minute = per_minute
        self._requests: OrderedDict[str, deque[float]] = OrderedDict()

    def admit(self, key: str) -> None:
        """Count a request.

        Raises:
            TooManyReportsError: beyond the limit; it is not counted.
        """
        now = time.monotonic()
        times = self._requests.setdefault(key, deque())
        self._requests.move_to_end(key)
        while times and times[0] <= now - _WINDOW_SECONDS:
            times.popleft()
        if len(times) >= self.per_minute:
            wait = max(1, round(times[0] + _WINDOW_SECONDS - now))
            raise TooManyReportsError(self.whose, self.per_minute, wait)
        times.append(now)
        while len(self._requests) > _MOST_KEYS:
            self._requests.popitem(last=False)


@dataclass(frozen=True)
class PilotRates:
    """Limits of one process. A whole site may have one address, so that one is the larger."""

    address: RequestRate = field(default_factory=lambda: RequestRate("address", 1_200))
    pilot: RequestRate = field(default_factory=lambda: RequestRate("pilot", 30))


#: An application has one event loop; tests have many.
_of_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, PilotRates] = WeakKeyDictionary()


async def pilot_rates() -> PilotRates:
    """The `PilotRates` of this process."""
    return _of_loop.setdefault(asyncio.get_running_loop(), PilotRates())
