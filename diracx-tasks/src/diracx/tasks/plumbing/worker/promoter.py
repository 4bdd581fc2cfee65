"""Delayed tasks begin in time, should no scheduler see to it."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from .._util.retrying import may_pass, retry_until_available

if TYPE_CHECKING:
    from ..broker import RedisStreamBroker

#: Many workers may look, and one look finds all that is due: so long is left between two.
_PAUSE_SECONDS = 0.002


class Promoter:
    """Moves what is due into the queues: at its moment while nobody leads, else when the lead would end.

    Args:
        again_seconds: how often to look, whatever is known.
    """

    def __init__(self, broker: RedisStreamBroker, again_seconds: float) -> None:
        self._broker = broker
        self._again_seconds = again_seconds
        self._look_at = 0.0
        self._earlier = asyncio.Event()

    def hear(self, due_in_ms: bytes) -> None:
        """Note that a message was put aside, of which no scheduler heard."""
        look_at = time.monotonic() + int(due_in_ms) / 1000
        if look_at < self._look_at:
            self._look_at = look_at
            self._earlier.set()

    async def run(self) -> None:
        """Look, for ever."""
        while True:
            self._look_at = time.monotonic() + self._again_seconds
            again_ms = await retry_until_available(self._broker.promote, "promote delayed tasks", passing=may_pass)
            if again_ms is not None:
                self._look_at = min(self._look_at, time.monotonic() + again_ms / 1000)
            await asyncio.sleep(_PAUSE_SECONDS)
            while (left := self._look_at - time.monotonic()) > 0:
                self._earlier.clear()
                try:
                    async with asyncio.timeout(left):
                        await self._earlier.wait()
                except TimeoutError:
                    break
