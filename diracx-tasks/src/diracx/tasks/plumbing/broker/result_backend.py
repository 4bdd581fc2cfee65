"""Reads and writes results by task id."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from . import keys
from .connection import async_client
from .models import TaskResult

if TYPE_CHECKING:
    from redis.asyncio import Redis


class ResultReader:
    """Reads stored results by task id."""

    redis: Redis
    result_prefix = keys.RESULT_PREFIX

    async def is_result_ready(self, task_id: str) -> bool:
        """True if a result is stored under this id."""
        return bool(await self.redis.exists(self.result_prefix + task_id))

    async def get_result(self, task_id: str) -> TaskResult[Any]:
        """Read the stored result of a task.

        Raises:
            ResultIsMissingError: when there is none (yet, or any more).
        """
        data: Any = await self.redis.get(self.result_prefix + task_id)
        return TaskResult.loadb(data)

    async def wait_result(self, task_id: str, timeout: float | None = None) -> TaskResult[Any]:
        """Wait until the result of a task is stored, and return it.

        The worker announces it on a channel of the same name; polling covers a lost message.

        Raises:
            TimeoutError: after `timeout` seconds.
        """
        key = self.result_prefix + task_id
        async with asyncio.timeout(timeout), self.redis.pubsub() as pubsub:
            await pubsub.subscribe(key)
            while True:
                data: Any = await self.redis.get(key)
                if data is not None:
                    return TaskResult.loadb(data)
                while True:
                    message = await pubsub.get_message(timeout=1.0)
                    if message is None or message["type"] == "message":
                        break


class RedisResultBackend(ResultReader):
    """Reads and writes results without a broker: the interface of the published package.

    Args:
        result_ttl_seconds: time to live of a result; by default a day.
    """

    def __init__(
        self,
        redis_url: str,
        prefix: str = keys.RESULT_PREFIX.rstrip(":"),
        result_ttl_seconds: int | None = None,
        max_connection_pool_size: int | None = None,
        **connection_kwargs: Any,
    ) -> None:
        self.redis = async_client(redis_url, max_connections=max_connection_pool_size, **connection_kwargs)
        self.prefix, self.result_prefix = prefix, f"{prefix}:"
        self.result_ttl_seconds = result_ttl_seconds or 86_400

    async def startup(self) -> None:
        """Do nothing: connections are opened at first use."""

    async def shutdown(self) -> None:
        """Close the connections."""
        await self.redis.aclose()

    async def set_result(self, task_id: str, result: TaskResult[Any]) -> None:
        """Store a result."""
        await self.redis.set(self.result_prefix + task_id, result.dumpb(), ex=self.result_ttl_seconds)
