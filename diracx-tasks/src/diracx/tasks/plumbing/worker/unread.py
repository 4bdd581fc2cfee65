"""Requeues deliveries that arrive while a task blocks the event loop.

A worker with running tasks waits for messages with a blocking read that reserves them, as an idle one does. A
thread watches the socket; a reply that stays unread is requeued, for other workers to start.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress

from .._util.tasks import in_own_thread

logger = logging.getLogger(__name__)

#: How long a reply may stay unread before the event loop is checked.
_UNREAD_SECONDS = 0.02
#: How long the event loop may take to run a callback before the messages are requeued.
_BLOCKED_SECONDS = 0.1


class _Wait:
    """One blocking read, whose reply goes either to the event loop or to the guard: the first to take it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.ended, self.requeued = threading.Event(), threading.Event()
        self._free = threading.Semaphore()

    def take(self) -> bool:
        """Take the reply; True if the caller is the first."""
        return self._free.acquire(blocking=False)


class UnreadGuard:
    """Requeues deliveries that the event loop does not read. Its thread starts with the first wait.

    Args:
        requeue: requeues reserved deliveries that the worker does not hold; called in the guard's thread, may
            raise.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, requeue: Callable[[], None]) -> None:
        self._loop = loop
        self._requeue = requeue
        self._wait: _Wait | None = None
        self._closed = False
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._thread = threading.Thread(target=self._run, name="diracx-unread-guard", daemon=True)

    def expect(self, descriptor: int) -> None:
        """Watch a socket: from now on, tasks may be reserved for the worker, with the reply arriving there."""
        if self._thread.ident is None:
            self._thread.start()
        self._wait = _Wait(descriptor)
        self._wake()

    async def read(self) -> bool:
        """End the watch, as the reply was read or never will be; True if the guard has requeued deliveries."""
        wait, self._wait = self._wait, None
        if wait is None:
            return False
        wait.ended.set()
        if wait.take():
            return False
        await in_own_thread(wait.requeued.wait)
        return True

    def close(self) -> None:
        """End the thread, after a requeue that is running."""
        self._closed = True
        if self._thread.ident is not None:
            self._wake()
            self._thread.join()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # the pipe is full of earlier calls
            os.write(self._wake_write, b".")

    def _run(self) -> None:
        while not self._closed:
            wait = self._wait
            events = select.poll()
            events.register(self._wake_read, select.POLLIN)
            if wait is not None and not wait.ended.is_set():
                events.register(wait.descriptor, select.POLLIN)
            ready = [descriptor for descriptor, _ in events.poll()]
            if self._wake_read in ready:
                os.read(self._wake_read, 4096)
            elif wait is not None and not wait.ended.wait(_UNREAD_SECONDS) and self._loop_is_blocked():
                self._take_and_requeue(wait)
                wait.ended.wait()  # this read has no further reply

    def _loop_is_blocked(self) -> bool:
        """True if it runs no callback in time. A loop that does is still reading a large, incomplete reply."""
        ran = threading.Event()
        try:
            self._loop.call_soon_threadsafe(ran.set)
        except RuntimeError:  # the loop is closed
            return False
        return not ran.wait(_BLOCKED_SECONDS)

    def requeue_now(self) -> None:
        """Requeue unread deliveries, from any thread, after the blocking read has ended on the server."""
        if (wait := self._wait) is not None:
            self._take_and_requeue(wait)

    def _take_and_requeue(self, wait: _Wait) -> None:
        if not wait.take():
            return
        try:
            self._requeue()
        except Exception as error:
            logger.warning("cannot hand back tasks that arrived while the event loop is blocked: %s", error)
        finally:
            wait.requeued.set()
