"""Message storage: key names, message models, the Lua steps and the broker that calls them.

The names here are loaded at their first use: who wants a key or a limit needs no client of Redis.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .models import Delivery as ReceivedMessage
    from .models import TaskBinding, TaskMessage, TaskResult, submit_task
    from .redis_streams import RedisStreamBroker
    from .result_backend import RedisResultBackend

__all__ = [
    "ReceivedMessage",
    "RedisResultBackend",
    "RedisStreamBroker",
    "TaskBinding",
    "TaskMessage",
    "TaskResult",
    "submit_task",
]
_HOME = {"RedisStreamBroker": "redis_streams", "RedisResultBackend": "result_backend"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME.get(name, 'models')}", __name__), name)
    globals()[name] = value
    return value
