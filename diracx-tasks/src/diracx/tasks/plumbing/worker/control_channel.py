"""Channels of a worker: notices of cancelled tasks the moment they are, and of delayed ones that no
scheduler sees to; and of workers with a shorter lease than any before. The lease keeper listens.

A channel forgets what nobody heard. Marks in Redis are the safety net for what is cancelled: a worker finds them
with what it takes in, and the lease keeper with what runs. What is delayed is looked at now and then.
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

#: A task that was announced may just be on its way to us; so long is remembered that it was.
_REMEMBERED_SECONDS = 60.0


class ControlChannel:
    """Cancels what runs and is announced as cancelled, and passes on the rest.

    Args:
        consumer: name of the worker.
        running: what runs; a live view.
        promoter: hears in how many ms a task is due that no scheduler sees to.
    """

    def __init__(self, consumer: str, running: Collection[Execution], promoter: Promoter) -> None:
        self.channels = control_channels(consumer)
        self._running = running
        self._promoter = promoter
        self._at_shorter_lease: tuple[Callable[[], None], ...] = ()
        self._heard: dict[str, float] = {}  # the earliest first
        self._cancelling = CallsInRounds()

    def call_at_shorter_lease(self, *calls: Callable[[], None]) -> None:
        """Make these calls when there is a worker whose lease is the shortest of all."""
        self._at_shorter_lease = calls

    def cancelled_since(self, moment: float, task_id: str) -> bool:
        """True if it was announced as cancelled after `moment` (of the monotonic clock)."""
        return self._heard.get(task_id, float("-inf")) >= moment

    def listening(self) -> None:
        """The channels are subscribed to: what was said before, we have not heard."""
        self._promoter.hear(b"0")

    def receive(self, channel: bytes, data: bytes) -> None:
        """A message has come."""
        try:
            if channel == _WAKE:
                self._promoter.hear(data)
            elif channel == _LEASES:
                for call in self._at_shorter_lease:
                    call()
            elif channel == _CANCELLED:
                self._hear({data.decode()})
            else:
                self._hear(set(msgpack.unpackb(data, unicode_errors="surrogatepass")))
        except Exception as error:  # whatever it is: without it, all is found a little later
            logger.warning("a message on the channel %r cannot be read: %s", channel, error)

    def _hear(self, task_ids: set[str]) -> None:
        now = time.monotonic()
        while self._heard and self._heard[earliest := next(iter(self._heard))] < now - _REMEMBERED_SECONDS:
            del self._heard[earliest]
        for task_id in task_ids:
            self._heard.pop(task_id, None)
            self._heard[task_id] = now
        self._cancelling.add(each.cancel for each in self._running if each.message.task_id in task_ids)
