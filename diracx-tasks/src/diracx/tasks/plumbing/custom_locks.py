"""Locks with custom `acquire`, `release` or `extend`: acquired one by one, after the others."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from ._util.retrying import is_transient
from .locks import LONGEST_MS, SAFETY_MARGIN
from .messages.error_info import one_line

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from .locks import BaseLock

logger = logging.getLogger(__name__)

_EXTEND_SECONDS = 10.0


async def acquire_custom(
    stack: AsyncExitStack, locks: Sequence[BaseLock], redis: Redis, on_lost: Callable[[str], None]
) -> str | None:
    """Acquire locks in order, until one refuses. The stack extends them, and releases them in reverse order.

    Args:
        on_lost: called with the reason when a lock can no longer be extended.

    Returns:
        None if all are held, else a message with the lock that refused, or whose server does not respond.
    """
    for lock in locks:
        try:
            granted = await lock.acquire(redis)
        except Exception as error:
            if not is_transient(error):
                raise
            return f"{lock!r} does not respond: {error}"
        if not granted:
            return f"held by another owner: {lock!r}"
        stack.push_async_callback(_release, lock, redis)
        stack.callback(asyncio.create_task(_extend(lock, redis, on_lost)).cancel)
    return None


async def _release(lock: BaseLock, redis: Redis) -> None:
    try:
        await lock.release(redis)
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # code of users may raise anything
        logger.error("cannot release %r: %s", lock, one_line(error))


async def _extend(lock: BaseLock, redis: Redis, on_lost: Callable[[str], None]) -> None:
    """Extend a lock three times in its `ttl_ms`, or every 10 s.

    Only after a True, False means lost; so do errors and calls that hang, when the lock is about to expire.
    """
    ttl = getattr(lock, "ttl_ms", LONGEST_MS) / 1000
    term = ttl * (1 - SAFETY_MARGIN)
    lost_at, extended = time.monotonic() + term, False
    while True:
        await asyncio.sleep(min(_EXTEND_SECONDS, ttl / 3, lost_at - time.monotonic()))
        now = time.monotonic()
        try:
            async with asyncio.timeout(max(ttl / 30, lost_at - now)):
                kept = await lock.extend(redis)
            lost = extended and not kept
            extended, lost_at = kept, now + term
        except NotImplementedError:
            return  # like one that always returns False
        except BaseException as error:  # code of users may raise anything
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            logger.warning("cannot extend %r: %s", lock, one_line(error))
            lost = time.monotonic() >= lost_at
        if lost:
            return on_lost(f"could not be extended: {lock!r}")
