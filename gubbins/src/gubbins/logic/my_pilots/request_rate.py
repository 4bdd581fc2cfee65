"""Rate limits of requests from pilots, per process of the application."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from gubbins.domain.exceptions import TooManyReportsError

_WINDOW_SECONDS = 60.0
#: Keys that are tracked; beyond, the least recently used are dropped.
_MAX_KEYS = 20_000


class RequestRate:
    """Sliding windows of one minute, one per key.

    Args:
        counted_by: kind of the keys, for error messages.
    """

    def __init__(self, counted_by: str, per_minute: int) -> None:
        self.counted_by = counted_by
        self.per_minute = per_minute
        self._requests: OrderedDict[str, deque[float]] = OrderedDict()

    def admit(self, key: str) -> None:
        """Count a request.

        Raises:
            TooManyReportsError: the limit is reached; the request is not counted.
        """
        if wait := self.wait_seconds(key):
            raise TooManyReportsError(self.counted_by, self.per_minute, wait)
        self.count(key)

    def wait_seconds(self, key: str) -> int:
        """Time until the limit allows another request; 0: it does now. The key counts as used."""
        if key in self._requests:
            self._requests.move_to_end(key)
        times, begin = self._requests.get(key, deque()), time.monotonic() - _WINDOW_SECONDS
        while times and times[0] <= begin:
            times.popleft()
        return max(1, round(times[0] - begin)) if len(times) >= self.per_minute else 0

    def count(self, key: str) -> None:
        """Count a request, whatever the limit."""
        self._requests.setdefault(key, deque()).append(time.monotonic())
        self._requests.move_to_end(key)
        while len(self._requests) > _MAX_KEYS:
            self._requests.popitem(last=False)


@dataclass(frozen=True)
class PilotRates:
    """Rate limits of one process; the one by address is larger, for all pilots of a site may share an address."""

    address: RequestRate = field(default_factory=lambda: RequestRate("address", 1_200))
    pilot: RequestRate = field(default_factory=lambda: RequestRate("pilot", 30))


#: By event loop: an application has one, tests have many.
_by_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, PilotRates] = WeakKeyDictionary()


async def pilot_rates() -> PilotRates:
    """Return the limits of this process."""
    return _by_loop.setdefault(asyncio.get_running_loop(), PilotRates())
