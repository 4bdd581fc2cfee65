"""Cancel asyncio tasks and wait for their end."""

from __future__ import annotations

__all__ = ["cancel_and_wait"]

import asyncio
from typing import Any

_CANCEL_AGAIN_SECONDS = 0.1


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
