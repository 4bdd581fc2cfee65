"""Subscribes to a channel, to react at once and not at the next poll."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError

from .._util.tasks import cancel_and_wait

if TYPE_CHECKING:
    from redis.asyncio import Redis

logger = logging.getLogger(__name__)

#: Timeout of the subscription.
_REPLY_SECONDS = 5.0
#: Timeout of one wait for a message, after which the next wait begins.
_WAIT_SECONDS = 60.0


@asynccontextmanager
async def listening(
    redis: Redis, channel: str, receive: Callable[[bytes], None]
) -> AsyncIterator[asyncio.Task[None] | None]:
    """Call `receive` with each message of a channel from now on, on a connection of its own.

    Yields the asyncio task that listens, which ends only with an error; None if the server's ACL forbids the
    channel.
    """
    async with redis.pubsub() as pubsub:
        try:
            await pubsub.subscribe(channel)
            if await pubsub.get_message(timeout=_REPLY_SECONDS) is None:
                raise RedisConnectionError(f"no reply within {_REPLY_SECONDS:g} s")
        except NoPermissionError:
            logger.warning("may not listen on the channel %s: allow &diracx:* to its user", channel)
            yield None
            return
        receiving = asyncio.create_task(_receive_all(pubsub, receive))
        try:
            yield receiving
        finally:
            await cancel_and_wait(receiving)


async def _receive_all(pubsub: Any, receive: Callable[[bytes], None]) -> None:
    while True:
        message = await pubsub.get_message(timeout=_WAIT_SECONDS)
        if message is not None and message["type"] == "message":
            receive(message["data"])
