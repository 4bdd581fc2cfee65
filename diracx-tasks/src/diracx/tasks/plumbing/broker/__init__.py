"""Where messages live: key names, message models, the Lua steps and the broker that calls them."""

from __future__ import annotations

from .redis_streams import RedisStreamBroker

__all__ = ["RedisStreamBroker"]
