"""Handles the pub/sub messages for one worker: cancelled tasks, delayed tasks without a scheduler that promotes
them, and a shorter lease among the workers. The lease keeper's connection subscribes to the channels.

Pub/sub does not redeliver. For cancellations, marks in Redis are the safety net: a worker reads them when it takes
a delivery, and the lease keeper with each renewal. Delayed tasks are polled for at an interval.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import msgpack

from .._util.tasks import CallsInRounds
from ..broker.worker_state import CANCELLED_CHANNEL, LEASES_CHANNEL, WAKE_CHANNEL, control_channels

if TYPE_CHECKING:
    from .execution import Execution
    from .promoter import Promoter

logger = logging.getLogger(__name__)

_CANCELLED, _WAKE, _LEASES = CANCELLED_CHANNEL.encode(), WAKE_CHANNEL.encode(), LEASES_CHANNEL.encode()

#: How long a cancellation is remembered: the delivery of that task may still be on its way to this worker.
_REMEMBERED_SECONDS = 60.0


class ControlChannel:
    """Cancels running tasks on request, and forwards the other messages.

    Args:
        consumer: name of the worker.
        running: the running executions; a live view.
        promoter: receives the delay in ms of each delayed task that no scheduler promotes.
    """

    def __init__(self, consumer: str, running: Collection[Execution], promoter: Promoter) -> None:
        self.channels = control_channels(consumer)
        self._running = running
        self._promoter = promoter
        self._at_shorter_lease: tuple[Callable[[], None], ...] = ()
        self.announced: dict[str, float] = {}
        """Ids of cancelled tasks, with the time of the message (`time.monotonic`); the earliest first."""
        self._cancelling = CallsInRounds()

    def call_at_shorter_lease(self, *calls: Callable[[], None]) -> None:
        """Register calls to make when a worker starts whose lease is shorter than all others."""
        self._at_shorter_lease = calls

    def cancelled_since(self, moment: float, task_id: str) -> bool:
        """True if the cancellation was announced after `moment` (of the monotonic clock)."""
        return self.announced.get(task_id, float("-inf")) >= moment

    def listening(self) -> None:
        """Handle a new subscription: earlier messages were missed, so poll for delayed tasks now."""
        self._promoter.due_in(b"0")

    def receive(self, channel: bytes, data: bytes) -> None:
        """Handle a message."""
        try:
            if channel == _WAKE:
                self._promoter.due_in(data)
            elif channel == _LEASES:
                for call in self._at_shorter_lease:
                    call()
            elif channel == _CANCELLED:
                self._note_cancelled({data.decode()})
            else:
                self._note_cancelled(set(msgpack.unpackb(data, unicode_errors="surrogatepass")))
        except Exception as error:  # any: polling makes up for a lost message
            logger.warning("a message on the channel %r cannot be read: %s", channel, error)

    def _note_cancelled(self, task_ids: set[str]) -> None:
        now = time.monotonic()
        while (
            self.announced and self.announced[earliest := next(iter(self.announced))] < now - _REMEMBERED_SECONDS
        ):
            del self.announced[earliest]
        for task_id in task_ids:
            self.announced.pop(task_id, None)
            self.announced[task_id] = now
        self._cancelling.add(each.cancel for each in self._running if each.message.task_id in task_ids)
