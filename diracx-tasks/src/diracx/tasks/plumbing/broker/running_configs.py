"""The configuration that each process runs with, as the processes publish it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .keys import CONFIG_IN_FORCE
from .scripts import script
from .stored import text_of

if TYPE_CHECKING:
    from redis.asyncio import Redis

__all__ = ["CONFIG_IN_FORCE", "announce", "announcements"]


async def announce(redis: Redis, process: str, said: str, counts_ms: int, tidy: bool) -> None:
    """Say with which configuration a process runs (empty: none any more)."""
    await script("announce")(redis, args=[process, said, counts_ms, int(tidy)])


async def announcements(redis: Redis) -> dict[str, str]:
    """Process -> "{seen (ms)} {JSON}", as it was announced last."""
    said = await redis.execute_command("HGETALL", CONFIG_IN_FORCE)
    pairs = said.items() if isinstance(said, dict) else zip(said[::2], said[1::2], strict=True)
    return {text_of(process): text_of(value) for process, value in pairs}
