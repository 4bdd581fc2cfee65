"""All access to Redis: key names, message models, Lua scripts, their functions, and the broker.

Names are imported at first use, so that a program that needs only a key or a limit does not import redis-py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

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

__getattr__ = lazy_names(
    __name__,
    {
        ".models": ["ReceivedMessage", "TaskBinding", "TaskMessage", "TaskResult", "submit_task"],
        ".redis_streams": ["RedisStreamBroker"],
        ".result_backend": ["RedisResultBackend"],
    },
)
