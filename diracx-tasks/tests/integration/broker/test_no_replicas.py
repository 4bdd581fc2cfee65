"""A primary without replicas (`min-replicas-to-write`) refuses writes: clients retry."""

from __future__ import annotations

import pytest
from diracx.tasks.plumbing._util.retrying import is_transient
from diracx.tasks.plumbing.broker.connection import async_client
from diracx.tasks.testing.server import embedded_redis
from redis.exceptions import RedisError


async def test_a_write_refused_for_missing_replicas_passes_in_a_pipeline_as_well() -> None:
    with embedded_redis("--min-replicas-to-write", "1") as url:
        client = async_client(url)
        with pytest.raises(RedisError) as alone:
            await client.set("key", 1)
        with pytest.raises(RedisError) as piped:
            async with client.pipeline(transaction=False) as pipe:
                await pipe.set("key", 1).execute()
        await client.aclose()
    assert is_transient(alone.value)
    assert is_transient(piped.value)
