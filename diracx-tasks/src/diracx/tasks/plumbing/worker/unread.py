"""Notices that an answer of the server lies unread, as while a task blocks the event loop.

A worker that runs something waits for messages as an idle one does, by a wait that reserves them. What it is given
while its event loop is blocked is handed back, from a thread, for others to start.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress

logger = logging.getLogger(__name__)

#: How long an answer may lie unread before the event loop is asked for a sign of life.
_UNREAD_SECONDS = 0.02
#: How long that may take, before the messages are another worker's.
_BLOCKED_SECONDS = 0.1


class _Wait:
    """One wait, of which either the event loop has the answer or the guard: whichever is first."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.ended, self.handed_back = threading.Event(), threading.Event()
        self._free = threading.Semaphore()

    def take(self) -> bool:
        """True if the caller is the first."""
        return self._free.acquire(blocking=False)


class UnreadGuard:
    """Hands back what nobody reads. Its thread begins with the first wait.

    Args:
        hand_back: gives back what the worker does not know to hold; called from the guard's thread, may raise.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, hand_back: Callable[[], None]) -> None:
        self._loop = loop
        self._hand_back = hand_back
        self._wait: _Wait | None = None
        self._closed = False
        self._woken, self._waker = os.pipe()
        os.set_blocking(self._waker, False)
        self._thread = threading.Thread(target=self._run, name="diracx-unread-guard", daemon=True)

    def expect(self, descriptor: int) -> None:
        """Note that tasks may be reserved for us from now on; the answer comes by this socket."""
        if self._thread.ident is None:
            self._thread.start()
        self._wait = _Wait(descriptor)
        self._wake()

    async def read(self) -> bool:
        """The answer was read, or never will be. Whether what it reserved may have been handed back."""
        wait, self._wait = self._wait, None
        if wait is None:
            return False
        wait.ended.set()
        if wait.take():
            return False
        await asyncio.to_thread(wait.handed_back.wait)
        return True

    def close(self) -> None:
        """End the thread, as soon as it hands nothing back any more."""
        self._closed = True
        if self._thread.ident is not None:
            self._wake()
            self._thread.join()
        os.close(self._woken)
        os.close(self._waker)

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # it was called often
            os.write(self._waker, b".")

    def _run(self) -> None:
        while not self._closed:
            wait = self._wait
            events = select.poll()
            events.register(self._woken, select.POLLIN)
            if wait is not None and not wait.ended.is_set():
                events.register(wait.descriptor, select.POLLIN)
            ready = [descriptor for descriptor, _ in events.poll()]
            if self._woken in ready:
                os.read(self._woken, 4096)
            elif wait is not None and not wait.ended.wait(_UNREAD_SECONDS) and self._loop_is_blocked():
                self._give_back(wait)
                wait.ended.wait()  # nothing more comes by this wait

    def _loop_is_blocked(self) -> bool:
        """True if it gives no sign of life. If it does, it is reading a large answer of which a part has come."""
        answered = threading.Event()
        try:
            self._loop.call_soon_threadsafe(answered.set)
        except RuntimeError:  # it is closed
            return False
        return not answered.wait(_BLOCKED_SECONDS)

    def give_back(self) -> None:
        """Hand back what has come and is not read; from any thread, when the server gives us nothing more."""
        if (wait := self._wait) is not None:
            self._give_back(wait)

    def _give_back(self, wait: _Wait) -> None:
        if not wait.take():
            return
        try:
            self._hand_back()
        except Exception as error:
            logger.warning("cannot hand back what came while the event loop is blocked: %s", error)
        finally:
            wait.handed_back.set()
