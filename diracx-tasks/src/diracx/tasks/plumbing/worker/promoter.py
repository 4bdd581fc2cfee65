"""Promotes due delayed tasks in a worker, for the time in which no scheduler does."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from .._util.retrying import may_pass, retry_until_available

if TYPE_CHECKING:
    from ..broker import RedisStreamBroker

#: Pause between two polls of one worker: many workers may poll, and one poll promotes all due tasks.
_PAUSE_SECONDS = 0.002


class Promoter:
    """Moves due tasks into their queues: when due if no scheduler leads, else when the leader's lease would end.

    Args:
        again_seconds: the longest interval between polls.
    """

    def __init__(self, broker: RedisStreamBroker, again_seconds: float) -> None:
        self._broker = broker
        self._again_seconds = again_seconds
        self._next_poll = 0.0
        self._earlier = asyncio.Event()

    def due_in(self, due_in_ms: bytes) -> None:
        """Note that a task was delayed while no scheduler listened; it is due in `due_in_ms`."""
        next_poll = time.monotonic() + int(due_in_ms) / 1000
        if next_poll < self._next_poll:
            self._next_poll = next_poll
            self._earlier.set()

    async def run(self) -> None:
        """Poll and promote, until cancelled."""
        while True:
            self._next_poll = time.monotonic() + self._again_seconds
            again_ms = await retry_until_available(self._broker.promote, "promote delayed tasks", passing=may_pass)
            if again_ms is not None:
                self._next_poll = min(self._next_poll, time.monotonic() + again_ms / 1000)
            await asyncio.sleep(_PAUSE_SECONDS)
            while (left := self._next_poll - time.monotonic()) > 0:
                self._earlier.clear()
                try:
                    async with asyncio.timeout(left):
                        await self._earlier.wait()
                except TimeoutError:
                    break
