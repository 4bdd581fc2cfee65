"""Dead letters in Redis that wait for their import into the database."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .inspection import stream_heads
from .keys import DEAD_LETTERS
from .scripts import script

if TYPE_CHECKING:
    from redis.asyncio import Redis

__all__ = ["DEAD_LETTERS", "dead_letter_heads", "dead_letters", "delete_dead_letters"]


async def dead_letters(
    redis: Redis, worker: str, first: str, *, lease_ms: int, at_most: int, at_most_bytes: int
) -> list[tuple[str, dict[bytes, bytes]]]:
    """Read dead letters to import: entry and fields of each. An empty list while another worker imports them.

    Args:
        first: first entry, as for XRANGE.
        lease_ms: time for which other workers get none.
    """
    reply: Any = await script("dead_letters")(redis, args=[worker, lease_ms, first, at_most, at_most_bytes])
    return [(entry.decode(), dict(zip(parts[::2], parts[1::2], strict=True))) for entry, parts in reply]


async def delete_dead_letters(redis: Redis, entries: Sequence[str]) -> None:
    """Delete dead letters that have been imported."""
    await redis.execute_command("XDEL", DEAD_LETTERS, *entries)


async def dead_letter_heads(
    redis: Redis, first: str, count: int, at_most_bytes: int
) -> list[tuple[str, dict[bytes, bytes], int]]:
    """Dead letters in Redis, oldest first: entry, fields truncated to `at_most_bytes`, and their length."""
    [found] = await stream_heads(redis, [(DEAD_LETTERS, first, "+", count)], at_most_bytes)
    return found
