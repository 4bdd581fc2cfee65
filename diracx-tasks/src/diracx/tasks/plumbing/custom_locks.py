"""Locks with custom `acquire`, `release` or `extend`: acquired one by one, after the others."""

from __future__ import annotations

import asyncio
import logging
import math
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
        on_lost: called once, when a lock can no longer be extended.

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
    stack.callback(asyncio.create_task(_extend(locks, redis, on_lost)).cancel)
    return None


async def _release(lock: BaseLock, redis: Redis) -> None:
    try:
        await lock.release(redis)
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # code of users may raise anything
        logger.error("cannot release %r: %s", lock, one_line(error))


async def _extend(locks: Sequence[BaseLock], redis: Redis, on_lost: Callable[[str], None]) -> None:
    """Extend the locks every third of the shortest `ttl_ms`.

    Only after a True, False means lost; so do errors and calls that hang, when the lock is about to expire.
    """
    ttls = [getattr(lock, "ttl_ms", LONGEST_MS) / 1000 for lock in locks]
    seconds = min(_EXTEND_SECONDS, *(ttl / 3 for ttl in ttls))
    lost_at = [math.inf] * len(locks)
    while True:
        await asyncio.sleep(min(seconds, min(lost_at) - time.monotonic()))
        for at, lock in enumerate(locks):
            now = time.monotonic()
            try:
                async with asyncio.timeout(min(LONGEST_MS / 1000, max(seconds / 10, lost_at[at] - now))):
                    kept = await lock.extend(redis)
                if kept:
                    lost_at[at] = now + ttls[at] * (1 - SAFETY_MARGIN)
            except BaseException as error:  # code of users may raise anything
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                logger.warning("cannot extend %r: %s", lock, one_line(error))
                kept = time.monotonic() < lost_at[at]
            if not kept and lost_at[at] < math.inf:
                return on_lost(f"could not be extended: {lock!r}")
