"""Fixtures for lines of waiting tasks."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis
from support.lines import Worker, a_worker


@pytest.fixture
async def worker(redis_url: str, redis: Redis) -> AsyncIterator[Worker]:
    async for worker in a_worker(redis, redis_url, "a", "medium"):
        yield worker


@pytest.fixture
async def small(redis_url: str, redis: Redis) -> AsyncIterator[Worker]:
    """A worker of another size, controlled by a test."""
    async for worker in a_worker(redis, redis_url, "b", "small"):
        yield worker
