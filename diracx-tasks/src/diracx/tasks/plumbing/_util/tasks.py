"""Cancel asyncio tasks, and wait for their end."""

from __future__ import annotations

__all__ = ["CallsInRounds", "cancel_and_wait"]

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

_CANCEL_AGAIN_SECONDS = 0.1
#: Cancellations in one round of the event loop: their tasks end in the next ones, a few ms each.
_AT_ONCE = 10


class CallsInRounds:
    """Makes a few calls in each round of the event loop, so that nothing else waits for all of them."""

    def __init__(self) -> None:
        self._calls: deque[Callable[[], object]] = deque()
        self._going = False

    def add(self, calls: Iterable[Callable[[], object]]) -> None:
        """Make these calls after those that were added before, which must not raise."""
        self._calls.extend(calls)
        if not self._going:
            self._go_on()

    def _go_on(self) -> None:
        some = [self._calls.popleft() for _ in range(min(_AT_ONCE, len(self._calls)))]
        self._going = bool(some)
        for call in some:
            call()
        if some:
            asyncio.get_running_loop().call_soon(self._go_on)


async def cancel_and_wait(*tasks: asyncio.Future[Any]) -> None:
    """Cancel these, and return when all of them have ended, with whatever result.

    They are cancelled more than once if need be: `asyncio.wait_for`, inside a client library, loses a
    cancellation that comes together with its answer (Python 3.11).
    """
    while running := [task for task in tasks if not task.done()]:
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=_CANCEL_AGAIN_SECONDS)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # it counts as retrieved
