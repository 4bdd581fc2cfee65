"""Cache in which concurrent requests for the same key share one computation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

_Value = TypeVar("_Value")


@dataclass(slots=True)
class _Entry:
    future: asyncio.Future[Any]
    ttl_seconds: float
    done_at: float | None = None
    """By the monotonic clock; None: it is being computed."""

    def is_expired(self) -> bool:
        return self.done_at is not None and time.monotonic() - self.done_at > self.ttl_seconds


class SingleFlightCache:
    """Caches values by key; computes each key once at a time, and different keys concurrently."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, _Entry] = {}

    async def get(self, key: Hashable, compute: Callable[[], Awaitable[_Value]], ttl_seconds: float) -> _Value:
        """Return the cached value, or wait for the running computation, else compute it.

        An exception of `compute` is raised by all waiting calls, and not cached. The computation continues if its
        callers are cancelled.
        """
        entry = self._entries.get(key)
        if entry is None or entry.is_expired():
            entry = self._add(key, asyncio.ensure_future(compute()), ttl_seconds)
        return cast("_Value", await asyncio.shield(entry.future))

    def put(self, key: Hashable, value: object, ttl_seconds: float) -> None:
        """Set a value."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        future.set_result(value)
        self._add(key, future, ttl_seconds)

    def _add(self, key: Hashable, future: asyncio.Future[Any], ttl_seconds: float) -> _Entry:
        self._entries = {other: entry for other, entry in self._entries.items() if not entry.is_expired()}
        added = self._entries[key] = _Entry(future, ttl_seconds)

        def on_done(_: object) -> None:
            added.done_at = time.monotonic()
            if (future.cancelled() or future.exception() is not None) and self._entries.get(key) is added:
                del self._entries[key]

        future.add_done_callback(on_done)
        return added
