"""Detects that a task blocks the event loop of its worker, and publishes which one, since when and where.

The loop cannot report that itself: the watchdog does, from its thread. Code that holds the GIL (a C extension)
stops that thread as well; the lease of such a worker ends, and it counts as dead.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from .._util.passwords import mask

if TYPE_CHECKING:
    from .execution import Execution

logger = logging.getLogger(__name__)

_PUBLISH_SECONDS = 5.0
_LONGEST_STACK = 4_000


class BlockedLoopDetector:
    """Asks the event loop for a sign of life, again and again. Made in the thread of the loop.

    Args:
        seconds: without a sign of life for so long the loop is blocked.
        running: the executions of the worker; a live view.
        publish: makes known what blocks the loop, None when nothing does any more; may raise.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        seconds: float,
        running: Collection[Execution],
        publish: Callable[[dict[str, Any] | None], None],
    ) -> None:
        self._loop = loop
        self._thread_id = threading.get_ident()
        self._seconds = seconds
        self._running = running
        self._publish = publish
        self._answered = threading.Event()
        self._answered.set()
        self._asked_at = time.monotonic()
        self._suspected = False
        self._blocked: dict[str, Any] | None = None
        self._published_at = 0.0

    def check(self) -> None:
        """Look once; called about twice a second, in the watchdog's thread."""
        now = time.monotonic()
        if self._answered.is_set():
            self._suspected = False
            if self._blocked is not None and self._try_publish(None):
                logger.warning("the event loop goes on, after %.0f s", time.time() - self._blocked["since"])
                self._blocked = None
            self._answered, self._asked_at = threading.Event(), now
            try:
                self._loop.call_soon_threadsafe(self._answered.set)
            except RuntimeError:  # the loop is closed
                self._answered.set()
        elif now - self._asked_at >= self._seconds:
            # Seen twice: after a pause of the whole process the loop needs a moment, too.
            if not self._suspected:
                self._suspected = True
            elif self._blocked is None:
                self._blocked = self._describe(now)
                self._report(self._blocked)
                self._try_publish(self._blocked)
            elif now - self._published_at >= _PUBLISH_SECONDS:
                self._try_publish(self._blocked)

    def _describe(self, now: float) -> dict[str, Any]:
        execution = self._blocking()
        frame = sys._current_frames().get(self._thread_id)
        stack = "" if frame is None else mask("".join(traceback.format_stack(frame)))
        return {
            "since": time.time() - (now - self._asked_at),
            "task_id": None if execution is None else execution.message.task_id,
            "task_name": None if execution is None else execution.message.task_name,
            "stack": stack[-_LONGEST_STACK:],
        }

    def _blocking(self) -> Execution | None:
        """The execution that the loop is in: that of the current task of asyncio, or the only one there is."""
        running, current = list(self._running), asyncio.current_task(self._loop)
        found = [execution for execution in running if execution.running is current]
        return next(iter(found or (running if len(running) == 1 else ())), None)

    def _report(self, blocked: dict[str, Any]) -> None:
        which = f"{blocked['task_name']} {blocked['task_id']}" if blocked["task_id"] else "a task"
        logger.error(
            "%s blocks the event loop for more than %g s: nothing else of this worker goes on. It is at\n%s",
            which,
            self._seconds,
            blocked["stack"],
            extra={f"task.{name}": blocked[f"task_{name}"] for name in ("name", "id") if blocked["task_id"]},
        )

    def _try_publish(self, blocked: dict[str, Any] | None) -> bool:
        self._published_at = time.monotonic()
        try:
            self._publish(blocked)
        except Exception as error:
            logger.debug("that the event loop is blocked cannot be published: %s", error)
            return False
        return True
