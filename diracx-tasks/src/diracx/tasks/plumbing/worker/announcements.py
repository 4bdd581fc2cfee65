"""Hears of cancelled tasks the moment they are, and of delayed ones that no scheduler sees to: one connection that
waits on three channels and costs a PING a minute.

A channel forgets what nobody heard. Marks in Redis are the safety net for what is cancelled: a worker finds them
with what it takes in, and the lease keeper with what runs. What is delayed is looked at now and then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import msgpack

from ..broker import keys

if TYPE_CHECKING:
    from ..broker import RedisStreamBroker

logger = logging.getLogger(__name__)

_CANCELLED, _WAKE = keys.CANCELLED.encode(), keys.WAKE_WORKERS.encode()

#: A task that was announced may just be on its way to us; so long is remembered that it was.
_REMEMBERED_SECONDS = 60.0
#: Pause before a lost connection is made again.
_RETRY_SECONDS = 1.0
#: A connection that brought nothing for so long is asked whether it lives,
_WAIT_SECONDS = 60.0
#: and has so long to answer: what has died without a word, as behind a firewall, says nothing for ever.
_ANSWER_SECONDS = 5.0


class Announcements:
    """Tasks that were announced as cancelled, or as delayed.

    Args:
        cancel: called with the ids of those that are cancelled.
        due: called with the milliseconds until one is due that nobody sees to.
    """

    def __init__(
        self, broker: RedisStreamBroker, cancel: Callable[[Collection[str]], None], due: Callable[[bytes], None]
    ) -> None:
        self._broker = broker
        self._cancel = cancel
        self._due = due
        self._heard: dict[str, float] = {}  # the earliest first
        self.listening = asyncio.Event()
        """Set once the first subscription stands, or has failed."""

    def heard_since(self, moment: float, task_id: str) -> bool:
        """Whether it was announced as cancelled after `moment` (of the monotonic clock)."""
        return self._heard.get(task_id, float("-inf")) >= moment

    async def run(self) -> None:
        """Listen, for ever."""
        ours = keys.CANCELLED_CHANNEL_PREFIX + self._broker.consumer_name
        failed = False
        while True:
            try:
                async with self._broker.redis.pubsub() as pubsub:
                    await pubsub.subscribe(ours, keys.CANCELLED, keys.WAKE_WORKERS)
                    self.listening.set()
                    self._due(b"0")  # what was said before, we have not heard
                    failed = False
                    while True:
                        message = await pubsub.get_message(timeout=_WAIT_SECONDS)
                        if message is None:
                            await pubsub.ping()
                            message = await pubsub.get_message(timeout=_ANSWER_SECONDS)
                            if message is None:
                                raise ConnectionError("the server does not answer")
                        if message["type"] == "message":
                            data = message["data"]
                            if message["channel"] == _WAKE:
                                self._due(data)
                            elif message["channel"] == _CANCELLED:
                                self._hear([data.decode()])
                            else:
                                self._hear(msgpack.unpackb(data, unicode_errors="surrogatepass"))
            except Exception as error:  # whatever it is: without us, all is found a little later
                self.listening.set()
                if not failed:
                    logger.warning(
                        "cannot listen for cancellations (%s); they take up to a third of a lease, and without a "
                        "scheduler delayed tasks are late",
                        error,
                    )
                failed = True
                await asyncio.sleep(_RETRY_SECONDS)

    def _hear(self, task_ids: Collection[str]) -> None:
        now = time.monotonic()
        while self._heard and self._heard[earliest := next(iter(self._heard))] < now - _REMEMBERED_SECONDS:
            del self._heard[earliest]
        for task_id in task_ids:
            self._heard.pop(task_id, None)
            self._heard[task_id] = now
        self._cancel(task_ids)
