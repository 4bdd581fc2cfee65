"""Publishes and reads the configuration with which each process runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .keys import CONFIG_IN_FORCE
from .scripts import script
from .stored import text_of

if TYPE_CHECKING:
    from redis.asyncio import Redis

__all__ = ["CONFIG_IN_FORCE", "announce", "announcements"]


async def announce(redis: Redis, process: str, text: str, counts_ms: int, tidy: bool) -> None:
    """Publish the configuration with which a process runs; an empty text: the process has ended."""
    await script("announce")(redis, args=[process, text, counts_ms, int(tidy)])


async def announcements(redis: Redis) -> dict[str, str]:
    """Read the last announcement of each process: "{seen (ms)} {JSON}"."""
    reply = await redis.execute_command("HGETALL", CONFIG_IN_FORCE)
    pairs = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)
    return {text_of(process): text_of(value) for process, value in pairs}
