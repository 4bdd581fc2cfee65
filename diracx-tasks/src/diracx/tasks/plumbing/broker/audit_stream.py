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
        vo: VO of the member who acted; None: an administrator.
        kept: approximate number of entries that the stream keeps.
    """
    async with redis.pipeline(transaction=True) as pipe:
        pipe.execute_command("XADD", _key(vo), "MAXLEN", "~", kept, "*", "data", data)
        pipe.execute_command("EXPIRE", _key(vo), ttl_seconds)
        entry: bytes
        entry, _ = await pipe.execute()
    return entry


async def entries(
    redis: Redis, vo: str | None, first: str, count: int, *, backwards: bool = False
) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """Entries from `first` on, as by XRANGE, or backwards from `first`, as by XREVRANGE."""
    read: Any = redis.xrevrange if backwards else redis.xrange
    found: list[tuple[bytes, dict[bytes, bytes]]] = await read(_key(vo), first, "-" if backwards else "+", count)
    return found
