"""Waits for conditions, with a deadline."""

from __future__ import annotations

__all__ = ["clients_wait", "eventually", "until", "until_renewed"]

import asyncio
import time
from collections.abc import Callable
from inspect import isawaitable
from typing import Any

from redis.asyncio import Redis

SECONDS = 100.0
"""Time after which a waiting test fails, before pytest ends it."""


async def until(
    condition: Callable[[], Any],
    what: str = "it",
    seconds: float = SECONDS,
    pause: float = 0.005,
    when: Callable[[Any], bool] = bool,
) -> Any:
    """Wait until a condition holds, asynchronous or not; returns what the condition returned.

    Args:
        when: tells whether it holds from what it returned, awaited.
        pause: seconds between two looks, at least: more for a condition that starts a program.
    """
    began = time.monotonic()
    while True:
        found = condition()
        if isawaitable(found):
            found = await found
        if when(found):
            return found
        waited = time.monotonic() - began
        assert waited < seconds, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(max(pause, min(waited / 20, 0.2)))  # many conditions ask a server


async def clients_wait(redis: Redis, number: int = 1, command: str = "xreadgroup") -> None:
    """Wait until the last command of so many clients is this one: workers wait for messages by XREADGROUP."""

    def enough(clients: list[dict[str, str]]) -> bool:
        return sum(client["cmd"] == command for client in clients) >= number

    await until(redis.client_list, f"{number} clients in {command}", when=enough)


async def until_renewed(redis: Redis, key: str, ttl_ms: int, times: int = 4) -> None:
    """Wait until a key has been renewed so often; it must not expire meanwhile."""
    renewed, left = 0, ttl_ms

    async def more() -> bool:
        nonlocal renewed, left
        before, left = left, await redis.pttl(key)
        assert left > 0
        renewed += left > before
        return renewed >= times

    await until(more, f"{times} renewals of {key}")


def eventually(condition: Callable[[], object], what: str = "it", seconds: float = SECONDS) -> None:
    """Wait until a condition holds, without an event loop."""
    began = time.monotonic()
    while not condition():
        waited = time.monotonic() - began
        assert waited < seconds, f"not within {seconds:g} s: {what}"
        time.sleep(max(0.02, min(waited / 20, 0.2)))  # many conditions run a command
