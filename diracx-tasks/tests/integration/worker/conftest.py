"""Fixtures for single steps of a worker."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from diracx.tasks.plumbing.broker import RedisStreamBroker


@pytest.fixture
async def broker(redis_url: str) -> AsyncIterator[RedisStreamBroker]:
    broker = RedisStreamBroker(redis_url)
    yield broker
    await broker.shutdown()
