"""Clients of one server for an event loop, whose connections may be few; and a connection beside the pool."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.asyncio.connection import (
    BlockingConnectionPool,
    Connection,
    ConnectionPool,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from .._util.retrying import is_write_to_closed

if TYPE_CHECKING:
    from .address import Address


#: The server closes the connection after a command that it cannot read, as one that is too large for it.
_CLOSES = "Protocol error"


class _LimitedSentinelPool(SentinelConnectionPool, BlockingConnectionPool):
    """A pool of connections to the primary where callers wait for a free one."""


class _LimitedClient(Redis):
    """Client that subscribes on connections beside the pool: a subscription would occupy one of it for ever."""

    def __init__(self, pool: ConnectionPool, beside: ConnectionPool) -> None:
        super().__init__(connection_pool=pool)
        self.auto_close_connection_pool = True
        self._beside = beside

    def pubsub(self, **options: Any) -> PubSub:
        """A listener, to be closed by the caller."""
        return PubSub(self._beside, **options)


def client_of(
    address: Address, options: Mapping[str, Any], of_sentinels: Mapping[str, Any], limit: int | None
) -> Redis:
    """A client for that address.

    Args:
        options: of connections to the server.
        of_sentinels: of those to the sentinels.
        limit: of connections for commands; None: as many as are asked for.
    """
    if limit is None:
        return Redis.from_pool(_pool(address, options, of_sentinels))
    waiting = {"max_connections": limit, "timeout": options["socket_timeout"]}
    return _LimitedClient(
        _pool(address, options, of_sentinels, **waiting), beside=_pool(address, options, of_sentinels)
    )


async def close_spare(redis: Redis, unused_seconds: float, keep: int) -> None:
    """Close the connections for commands that nobody has used for so long, but for `keep`. A pool closes none."""
    pool: Any = redis.connection_pool
    unused = [connection for connection in pool._available_connections if connection.is_connected]
    for connection in unused[: len(unused) - keep]:  # the last is used next
        if time.monotonic() - connection.used_at >= unused_seconds:
            await connection.disconnect(nowait=True)  # which waits for nothing, so none is taken meanwhile
            connection.was_connected = False  # it is not lost


def _pool(
    address: Address, options: Mapping[str, Any], of_sentinels: Mapping[str, Any], **limit: Any
) -> ConnectionPool:
    if address.service:
        sentinel_pool: Any = _LimitedSentinelPool if limit else SentinelConnectionPool
        sentinel = Sentinel(address.sentinels, sentinel_kwargs={**of_sentinels, "retry": Retry(NoBackoff(), 0)})
        for client in sentinel.sentinels:
            _report_losses(client.connection_pool)
        return _report_losses(sentinel_pool(address.service, sentinel, ssl=address.tls, **options, **limit))
    if "path" in options:
        connection_class: type[Any] = UnixDomainSocketConnection
    else:
        connection_class = SSLConnection if address.tls else Connection
    pool_class = BlockingConnectionPool if limit else ConnectionPool
    return _report_losses(pool_class(connection_class=connection_class, **options, **limit))


def _report_losses(pool: Any) -> ConnectionPool:
    """Let connections that this pool makes report their loss as such under every event loop.

    `pool.reconnects` counts those that were lost and opened again: each time, perhaps, to another server.
    """
    pool.reconnects = 0
    pool.connection_class = _reporting_losses(pool.connection_class, pool)
    return cast(ConnectionPool, pool)


def _reporting_losses(connection_class: type[Any], pool: Any) -> type[Any]:
    class Reporting(connection_class):  # type: ignore[misc]  # one of redis-py's, by the address
        was_connected = False
        used_at = 0.0

        async def on_connect_check_health(self, check_health: bool = True) -> None:
            await super().on_connect_check_health(check_health)
            pool.reconnects += self.was_connected
            self.was_connected = True

        async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
            self.used_at = time.monotonic()
            # asyncio of Python 3.12 and 3.13.0 would watch for a lost connection, under the number of the next.
            if self._writer is not None and self._writer.is_closing():
                await self.disconnect(nowait=True)
                raise RedisConnectionError("connection lost")
            try:
                await super().send_packed_command(command, check_health)
            except RuntimeError as error:  # of uvloop, lost since
                if is_write_to_closed(error):
                    raise RedisConnectionError("connection lost") from error
                raise

        async def read_response(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return await super().read_response(*args, **kwargs)
            except ResponseError as error:
                if str(error).startswith(_CLOSES):
                    await self.disconnect(nowait=True)  # or the next command would be lost
                raise

    return Reporting


class DirectConnection:
    """Commands that are sent together and answered one after the other, as a pipeline's.

    Args:
        redis: the client whose server it leads to, and whose `socket_timeout` holds for all answers of a call.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._pool: Any = redis.connection_pool
        self._connection: Any = None
        self.in_use = False
        """True if a caller waits for an answer."""

    async def execute(
        self, *commands: Sequence[Any], sent: Callable[[int], None] = lambda socket: None
    ) -> list[Any]:
        """The answers as the server gave them, refusals among them as exceptions.

        Args:
            sent: called with the descriptor of the socket by which they come, before they can be read.

        Raises:
            redis.exceptions.RedisError: when the server does not answer. Some commands may have been executed
                then, as they may when this is cancelled.
        """
        self.in_use = True
        if self._connection is None:
            self._connection = self._pool.make_connection()
            # One limit for all of it is ours; redis-py has one, and a task of asyncio, for each time it sends.
            self._connection.socket_timeout = None
        try:
            async with asyncio.timeout(self._pool.connection_kwargs.get("socket_timeout")):
                await self._pool.ensure_connection(self._connection)
                return await self._execute(commands, sent)
        except TimeoutError:
            raise RedisTimeoutError("no answer in time") from None
        finally:
            self.in_use = False

    async def _execute(self, commands: Sequence[Sequence[Any]], sent: Callable[[int], None]) -> list[Any]:
        answers: list[Any] = []
        try:
            await self._connection.send_packed_command(self._connection.pack_commands(commands))
            sent(self._descriptor())
            for _ in commands:
                try:
                    answers.append(await self._connection.read_response())
                except ResponseError as refusal:
                    answers.append(refusal)
        except BaseException:
            await self.close()  # or others would get what is still answered
            raise
        return answers

    async def execute_command(self, *command: Any) -> Any:
        """The answer to one command, as the client gives it. Others go by the pool while this is in use.

        Raises:
            redis.exceptions.RedisError: when the server refuses, or does not answer.
        """
        if self.in_use:
            return await self._redis.execute_command(*command)
        [answer] = await self.execute(command)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def close(self) -> None:
        """Close the connection; the next call opens one."""
        if self._connection is None:
            return
        writer = self._connection._writer
        if writer is not None and not writer.is_closing():
            # At once: both event loops close a socket in their next round, and the system not while a thread polls
            # it. The server could still do what was sent here, and nobody would hear of it.
            with suppress(OSError), socket.socket(fileno=os.dup(self._descriptor())) as same:
                same.shutdown(socket.SHUT_RDWR)
        await self._connection.disconnect(nowait=True)

    def _descriptor(self) -> int:
        descriptor: int = self._connection._writer.get_extra_info("socket").fileno()
        return descriptor
