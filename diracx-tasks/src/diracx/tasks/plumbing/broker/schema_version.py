"""The version of all that is in Redis: processes that do not know it stay out."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from redis.exceptions import OutOfMemoryError

from . import keys
from .server_check import UnusableServerError

if TYPE_CHECKING:
    from redis.asyncio import Redis

#: Raised with each change of what is in Redis.
VERSION = 1
#: The oldest version whose processes can work beside those of this one: raised with a change that they cannot.
OLDEST = 1


async def note_version(redis: Redis) -> None:
    """Note beside the data that processes of this version write, unless later ones have been there."""
    with suppress(OutOfMemoryError):  # the next start will
        await redis.zadd(keys.SCHEMA, {"version": VERSION, "oldest": OLDEST}, gt=True)


async def check_version(redis: Redis) -> None:
    """Look whether later processes have written what this version does not know.

    Raises:
        UnusableServerError: they have.
    """
    version, oldest = await redis.zmscore(keys.SCHEMA, ["version", "oldest"])
    if oldest is not None and oldest > VERSION:
        raise UnusableServerError(
            f"Redis has data of schema {version or oldest:.0f}, and this version of diracx-tasks knows schema "
            f"{VERSION}: start a later one; the way back is in the page Change a running system"
        )
