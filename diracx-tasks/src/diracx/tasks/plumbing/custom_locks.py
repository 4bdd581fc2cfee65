"""Locks with custom `acquire`, `release` or `extend`: acquired one by one, after the others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from ._util.retrying import is_transient

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
    except Exception as error:
        logger.error("cannot release %r: %s", lock, error)


async def _extend(locks: Sequence[BaseLock], redis: Redis, on_lost: Callable[[str], None]) -> None:
    """Extend the locks every third of the shortest `ttl_ms`. False means lost only after a True."""
    seconds = min([_EXTEND_SECONDS, *(lock.ttl_ms / 3000 for lock in locks if hasattr(lock, "ttl_ms"))])
    extended = [False] * len(locks)
    while True:
        await asyncio.sleep(seconds)
        for at, lock in enumerate(locks):
            try:
                kept = await lock.extend(redis)
            except Exception as error:
                logger.warning("cannot extend %r: %s", lock, error)
                continue
            if extended[at] and not kept:
                return on_lost(f"could not be extended: {lock!r}")
            extended[at] = bool(kept)
