"""Where messages live: key names, message models, the Lua steps and the broker that calls them.

The broker is loaded at its first use: who wants a name or a limit needs no client of Redis.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .redis_streams import RedisStreamBroker

__all__ = ["RedisStreamBroker"]


def __getattr__(name: str) -> Any:
    if name != "RedisStreamBroker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .redis_streams import RedisStreamBroker

    globals()[name] = RedisStreamBroker
    return RedisStreamBroker
