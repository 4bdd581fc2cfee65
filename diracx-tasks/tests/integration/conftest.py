"""Clears the record of the standard tasks before each test; and workers as a broker sees them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta

import pytest
from diracx.tasks.plumbing import Size
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.broker.models import in_ms
from redis.asyncio import Redis
from support.standard_tasks import SEEN


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    SEEN.clear()


@pytest.fixture
async def worker(redis_url: str, redis: Redis) -> AsyncIterator[Callable[..., Awaitable[RedisStreamBroker]]]:
    """A worker with a lease of so many seconds, as the broker sees it."""
    brokers = []

    async def enter(name: str, lease_seconds: float = 600, size: Size = Size.MEDIUM) -> RedisStreamBroker:
        broker = RedisStreamBroker(redis_url, consumer_name=name, worker_size=size)
        brokers.append(broker)
        await redis.zadd(keys.ALIVE, {name: in_ms(datetime.now(UTC) + timedelta(seconds=lease_seconds))})
        return broker

    yield enter
    for broker in brokers:
        await broker.shutdown()
