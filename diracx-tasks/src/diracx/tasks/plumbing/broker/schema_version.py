"""Version of the data in Redis, which keeps incompatible versions of the task system from working on it."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from redis.exceptions import OutOfMemoryError

from . import keys
from .server_check import UnusableServerError

if TYPE_CHECKING:
    from redis.asyncio import Redis

#: Schema of this version; raised with each change of the data in Redis.
VERSION = 1
#: Oldest schema that is compatible with this one; raised with an incompatible change.
OLDEST = 1


async def note_version(redis: Redis) -> None:
    """Record this version's schema in Redis, unless a later one is recorded."""
    with suppress(OutOfMemoryError):  # the next start will record it
        await redis.zadd(keys.SCHEMA, {"version": VERSION, "oldest": OLDEST}, gt=True)


async def check_version(redis: Redis) -> None:
    """Check that this version can work with the data in Redis.

    Raises:
        UnusableServerError: a later, incompatible version has written them.
    """
    version, oldest = await redis.zmscore(keys.SCHEMA, ["version", "oldest"])
    if oldest is not None and oldest > VERSION:
        raise UnusableServerError(
            f"Redis has data of schema {version or oldest:.0f}, and this version of diracx-tasks knows schema "
            f"{VERSION}: start a later one; the way back is in the page Change a running system"
        )
