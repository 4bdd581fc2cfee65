"""Cancels asyncio tasks and waits for their end; calls functions at the end of an event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

_Result = TypeVar("_Result")

_CANCEL_AGAIN_SECONDS = 0.1
#: Calls in one iteration of the event loop.
_BATCH = 10
#: An event loop itself keeps no reference to its tasks.
_until_end: set[asyncio.Task[None]] = set()


class CallsInRounds:
    """Runs queued calls in batches, one per iteration of the event loop, so that other work is not delayed."""

    def __init__(self) -> None:
        self._calls: deque[Callable[[], object]] = deque()
        self._scheduled = False

    def add(self, calls: Iterable[Callable[[], object]]) -> None:
        """Queue calls, which must not raise."""
        self._calls.extend(calls)
        if not self._scheduled:
            self._run_batch()

    def _run_batch(self) -> None:
        batch = [self._calls.popleft() for _ in range(min(_BATCH, len(self._calls)))]
        self._scheduled = bool(batch)
        for call in batch:
            call()
        if batch:
            asyncio.get_running_loop().call_soon(self._run_batch)


async def cancel_and_wait(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and wait for their end; their results and exceptions are ignored.

    The cancellation is repeated, as `asyncio.wait_for` of Python 3.11 loses one that comes together with its
    result.
    """
    while running := [task for task in tasks if not task.done()]:
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=_CANCEL_AGAIN_SECONDS)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # marks it as retrieved


async def in_own_thread(call: Callable[[], _Result]) -> _Result:
    """Run a function in a thread of its own: tasks may occupy all threads of `asyncio.to_thread`, for hours."""
    thread = ThreadPoolExecutor(1)
    try:
        return await asyncio.get_running_loop().run_in_executor(thread, call)
    finally:
        thread.shutdown(wait=False)


def at_end_of_loop(close: Callable[[], Awaitable[object]]) -> None:
    """Await `close` when the running event loop ends: `asyncio.run` and servers cancel all tasks then."""

    async def wait() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await close()

    waiting = asyncio.create_task(wait())
    _until_end.add(waiting)
    waiting.add_done_callback(_until_end.discard)
