"""Locks whose class has an `acquire`, `release` or `extend` of its own: asked one by one, after the others."""

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
    """Take the locks in their order, until one refuses; extended and, in reverse order, released by the stack.

    Args:
        on_lost: called once, when a lock can no longer be extended that could be before.

    Returns:
        What has refused, in words; None when all are held. A server that is away refuses.
    """
    for lock in locks:
        try:
            granted = await lock.acquire(redis)
        except Exception as error:
            if not is_transient(error):
                raise
            return f"{lock!r} cannot be asked: {error}"
        if not granted:
            return f"held by another owner: {lock!r}"
        stack.push_async_callback(_release, lock, redis)
    stack.callback(asyncio.create_task(_extend(locks, redis, on_lost)).cancel)
    return None


async def _release(lock: BaseLock, redis: Redis) -> None:
    try:
        await lock.release(redis)
    except Exception as error:  # what ran under it is done all the same
        logger.error("cannot release %r: %s", lock, error)


async def _extend(locks: Sequence[BaseLock], redis: Redis, on_lost: Callable[[str], None]) -> None:
    """Extend the locks three times in the shortest `ttl_ms`. False counts as lost after a True only."""
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
