"""Client connections: compatible with redis-py, with a time limit for sending."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from diracx.tasks.plumbing.broker.connection import async_client
from diracx.tasks.plumbing.enums import Priority
from redis.asyncio import Redis
from redis.asyncio.connection import Connection
from redis.exceptions import DataError
from redis.exceptions import TimeoutError as RedisTimeoutError
from support.network import Network

pytestmark = pytest.mark.event_loops("asyncio", "uvloop")

COMMANDS: list[tuple[Any, ...]] = [
    ("PING",),
    ("SET", "key", b"\x00\xff"),
    ("SET", "schlüssel", "größe"),
    ("ZADD", "key", 1.5, 10**20, 0.1 + 0.2, -1),
    ("SCRIPT LOAD", "return 1"),
    (b"CONFIG GET", "save"),
    ("SET", "key", Priority.NORMAL),
    ("SET", "key", memoryview(b"text")),
]


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Redis]:
    client = async_client(redis_url, socket_timeout=0.5)
    yield client
    await client.aclose()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: str(command[0]))
async def test_commands_are_packed_as_by_redis_py(client: Redis, command: tuple[Any, ...]) -> None:
    ours = client.connection_pool.make_connection().pack_command(*command)
    assert b"".join(ours) == b"".join(Connection().pack_command(*command))


async def test_values_that_redis_cannot_represent_are_refused(client: Redis) -> None:
    with pytest.raises(DataError):
        await client.execute_command("SET", "key", None)
    with pytest.raises(DataError):
        await client.execute_command("SET", "key", True)


async def test_sending_to_a_server_that_does_not_read_ends_in_time(redis_url: str) -> None:
    network = Network(redis_url)
    network.start()
    client = async_client(network.url, socket_timeout=0.5)
    try:
        assert await client.execute_command("ECHO", "1") == b"1"
        network.hold("to_server")
        with pytest.raises(RedisTimeoutError, match="cannot send in time"):
            await client.execute_command("ECHO", "x" * 64_000_000)
        network.release()
        assert await client.execute_command("ECHO", "2") == b"2"
        network.hold("to_client")
        with pytest.raises(RedisTimeoutError, match="reading"):
            await client.execute_command("ECHO", "3")
    finally:
        await client.aclose()
        network.stop()


async def test_two_calls_that_send_at_a_time_leave_the_connection_its_time_limit(redis_url: str) -> None:
    network = Network(redis_url)
    network.start()
    client = async_client(network.url, socket_timeout=0.5)
    connection: Any = client.connection_pool.make_connection()
    try:
        await connection.connect()
        network.hold("to_server")
        sends = [connection.send_command("ECHO", "x" * 64_000_000) for _ in range(2)]
        errors = await asyncio.gather(*sends, return_exceptions=True)
        assert any(isinstance(error, RedisTimeoutError) for error in errors)
        assert connection.socket_timeout == 0.5
    finally:
        await connection.disconnect(nowait=True)
        await client.aclose()
        network.stop()
