"""The audit log in Redis: a capped stream for administrators, and one for each VO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import keys

if TYPE_CHECKING:
    from redis.asyncio import Redis


def _key(vo: str | None) -> str:
    return keys.AUDIT if vo is None else f"{keys.AUDIT_PREFIX}{vo}"


async def append(redis: Redis, vo: str | None, data: str, *, kept: int, ttl_seconds: int) -> bytes:
    """Add an entry, and return its id.

    Args:
        vo: of the member whose action it is; None: an administrator's.
        kept: about so many entries stay.
    """
    async with redis.pipeline(transaction=True) as pipe:
        pipe.execute_command("XADD", _key(vo), "MAXLEN", "~", kept, "*", "data", data)
        pipe.execute_command("EXPIRE", _key(vo), ttl_seconds)
        entry: bytes
        entry, _ = await pipe.execute()
    return entry


async def newest_first(redis: Redis, vo: str | None, newest: str, count: int) -> Any:
    """Entries up to `newest` (as of XREVRANGE)."""
    return await redis.execute_command("XREVRANGE", _key(vo), newest, "-", "COUNT", count)


async def oldest_first(redis: Redis, vo: str | None, oldest: str, count: int) -> Any:
    """Entries from `oldest` on (as of XRANGE)."""
    return await redis.execute_command("XRANGE", _key(vo), oldest, "+", "COUNT", count)
