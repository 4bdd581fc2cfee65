"""Results by their tasks' ids without a broker: the interface of the published package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import keys
from .connection import async_client
from .models import TaskResult

if TYPE_CHECKING:
    from redis.asyncio import Redis


class RedisResultBackend:
    """Reads and writes results. A broker reads them itself: `RedisStreamBroker.get_result`.

    Args:
        result_ttl_seconds: how long a result is kept; by default a day.
    """

    def __init__(
        self,
        redis_url: str,
        prefix: str = keys.RESULT_PREFIX.rstrip(":"),
        result_ttl_seconds: int | None = None,
        max_connection_pool_size: int | None = None,
        **connection_kwargs: Any,
    ) -> None:
        self._redis: Redis = async_client(redis_url, max_connections=max_connection_pool_size, **connection_kwargs)
        self.prefix = prefix
        self.result_ttl_seconds = result_ttl_seconds or 86_400

    async def startup(self) -> None:
        """Do nothing: it connects when it is used."""

    async def shutdown(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    async def set_result(self, task_id: str, result: TaskResult[Any]) -> None:
        """Store a result."""
        await self._redis.set(f"{self.prefix}:{task_id}", result.dumpb(), ex=self.result_ttl_seconds)

    async def is_result_ready(self, task_id: str) -> bool:
        """True if a result is stored under this id."""
        return bool(await self._redis.exists(f"{self.prefix}:{task_id}"))

    async def get_result(self, task_id: str) -> TaskResult[Any]:
        """The stored result of a task. Raises `ResultIsMissingError` when there is none."""
        data: Any = await self._redis.get(f"{self.prefix}:{task_id}")
        return TaskResult.loadb(data)
