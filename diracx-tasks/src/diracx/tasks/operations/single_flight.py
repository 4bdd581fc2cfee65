"""Cache in which concurrent requests for the same key share one computation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, TypeVar, cast

_Value = TypeVar("_Value")


class SingleFlightCache:
    """Caches values by key; computes each key once at a time, and different keys concurrently."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, asyncio.Future[Any]] = {}

    async def get(self, key: Hashable, compute: Callable[[], Awaitable[_Value]], ttl_seconds: float) -> _Value:
        """Return the cached value, or wait for the running computation, else compute it.

        An exception of `compute` is raised by all waiting calls, and not cached. The computation continues if its
        callers are cancelled.
        """
        entry = self._entries.get(key)
        if entry is None:
            entry = self._add(key, asyncio.ensure_future(compute()), ttl_seconds)
        return cast("_Value", await asyncio.shield(entry))

    def put(self, key: Hashable, value: object, ttl_seconds: float) -> None:
        """Set a value."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        future.set_result(value)
        self._add(key, future, ttl_seconds)

    def _add(self, key: Hashable, entry: asyncio.Future[Any], ttl_seconds: float) -> asyncio.Future[Any]:
        def drop() -> None:
            if self._entries.get(key) is entry:
                del self._entries[key]

        def on_done(_: object) -> None:
            if entry.cancelled() or entry.exception() is not None:
                drop()
            else:
                entry.get_loop().call_later(ttl_seconds, drop)

        self._entries[key] = entry
        entry.add_done_callback(on_done)
        return entry
