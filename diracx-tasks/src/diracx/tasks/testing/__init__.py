"""Task system in one process, with a real server, for tests.

with embedded_redis() as redis_url: ...

async with TaskSystem([MyTask]) as system:
    task_id = await MyTask(1).schedule()
    result = await system.result(task_id, timeout=5)
"""

from __future__ import annotations

from .server import embedded_redis
from .system import TaskSystem

__all__ = ["TaskSystem", "embedded_redis"]
