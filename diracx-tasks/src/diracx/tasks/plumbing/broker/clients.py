"""Clients of one server for an event loop, with an optional limit of connections, and a connection outside the
pool.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any, cast

import hiredis
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


#: Start of the error after which the server closes the connection: the command was malformed or too large.
_CLOSES = "Protocol error"
_PLAIN = frozenset({str, bytes, int, float})


class _SentinelPool(SentinelConnectionPool):
    """Pool of connections to the primary that also closes those to the sentinels."""

    async def aclose(self) -> None:
        await super().aclose()
        for sentinel in self.sentinel_manager.sentinels:
            await sentinel.aclose()


class _LimitedSentinelPool(_SentinelPool, BlockingConnectionPool):
    """Pool of connections to the primary in which callers wait for a free one."""


class _LimitedClient(Redis):
    """Client with a separate pool for subscriptions, each of which would occupy a connection of a limited pool."""

    def __init__(self, pool: ConnectionPool, pubsub_pool: ConnectionPool) -> None:
        super().__init__(connection_pool=pool)
        self.auto_close_connection_pool = True
        self._pubsub_pool = pubsub_pool

    def pubsub(self, **options: Any) -> PubSub:
        """Make a subscription, to be closed by the caller."""
        return PubSub(self._pubsub_pool, **options)

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Close both pools."""
        await super().aclose(close_connection_pool)
        await self._pubsub_pool.aclose()


def client_of(
    address: Address, options: Mapping[str, Any], sentinel_options: Mapping[str, Any], limit: int | None
) -> Redis:
    """Make a client for an address.

    Args:
        options: options of connections to the server.
        sentinel_options: options of connections to the sentinels.
        limit: limit of connections for commands; None: no limit.
    """
    if limit is None:
        return Redis.from_pool(_pool(address, options, sentinel_options))
    limits = {"max_connections": limit, "timeout": options["socket_timeout"]}
    return _LimitedClient(
        _pool(address, options, sentinel_options, **limits),
        pubsub_pool=_pool(address, options, sentinel_options),
    )


async def close_spare(redis: Redis, unused_seconds: float, keep: int) -> None:
    """Close connections unused for `unused_seconds`, all but `keep`: redis-py's pools close none by themselves."""
    pool: Any = redis.connection_pool
    unused = [connection for connection in pool._available_connections if connection.is_connected]
    for connection in unused[: len(unused) - keep]:  # the last is used next
        if time.monotonic() - connection.used_at >= unused_seconds:
            await connection.disconnect(nowait=True)  # does not yield to the event loop, so no caller can take it
            connection.was_connected = False  # or its next use would count as a reconnect


def _pool(
    address: Address, options: Mapping[str, Any], sentinel_options: Mapping[str, Any], **limit: Any
) -> ConnectionPool:
    if address.service:
        sentinel_pool: Any = _LimitedSentinelPool if limit else _SentinelPool
        sentinel = Sentinel(
            address.sentinels, sentinel_kwargs={**sentinel_options, "retry": Retry(NoBackoff(), 0)}
        )
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
    """Make the pool's connections raise `ConnectionError` when they are lost, under asyncio and uvloop alike.

    `pool.reconnects` counts lost connections that were opened again, perhaps to another server.
    """
    pool.reconnects = 0
    pool.connection_class = _reporting_losses(pool.connection_class, pool)
    return cast(ConnectionPool, pool)


def _reporting_losses(connection_class: type[Any], pool: Any) -> type[Any]:
    class Reporting(connection_class):  # type: ignore[misc]  # a class of redis-py, which depends on the address
        was_connected = False
        used_at = 0.0
        socket_timeout: float | None
        send_seconds: float | None = None

        def pack_command(self, *args: Any) -> list[bytes]:
            if _PLAIN.issuperset(map(type, args)) and " " not in str(args[0]):
                return [hiredis.pack_command(args)]  # in a fifth of the time
            return cast("list[bytes]", super().pack_command(*args))

        async def on_connect_check_health(self, check_health: bool = True) -> None:
            await super().on_connect_check_health(check_health)
            pool.reconnects += self.was_connected
            self.was_connected = True

        async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
            self.used_at = time.monotonic()
            # asyncio of Python 3.12 and 3.13.0 would add a writer for a descriptor that another one may have.
            if self._writer is not None and self._writer.is_closing():
                await self.disconnect(nowait=True)
                raise RedisConnectionError("connection lost")
            # With this limit of its own, redis-py makes a task of asyncio for each time it sends (Python 3.11).
            self.send_seconds = self.socket_timeout or self.send_seconds  # the latter while another call sends
            self.socket_timeout = None
            try:
                async with asyncio.timeout(self.send_seconds) if self.send_seconds else nullcontext():
                    await super().send_packed_command(command, check_health)
            except TimeoutError:
                raise RedisTimeoutError("cannot send in time") from None
            except RuntimeError as error:  # uvloop's error for a lost connection
                if is_write_to_closed(error):
                    raise RedisConnectionError("connection lost") from error
                raise
            finally:
                self.socket_timeout = self.send_seconds

        async def read_response(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return await super().read_response(*args, **kwargs)
            except ResponseError as error:
                if str(error).startswith(_CLOSES):
                    await self.disconnect(nowait=True)  # the server closes it, and the next command would be lost
                raise

    return Reporting


class DirectConnection:
    """A connection outside the pool that sends commands together and reads their replies, like a pipeline.

    Args:
        redis: client of the same server; its `socket_timeout` limits each `send` and `replies` as a whole.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._pool: Any = redis.connection_pool
        self._timeout: float | None = self._pool.connection_kwargs.get("socket_timeout")
        self._connection: Any = None
        self._unread = 0
        self.in_use = False
        """True if commands are sent whose replies are not read."""

    async def execute(
        self,
        *commands: Sequence[Any],
        sent: Callable[[int], None] | None = None,
        first: Callable[[Any], None] | None = None,
    ) -> list[Any]:
        """Return the replies, with an exception for each refused command.

        Args:
            sent: called with the descriptor of the socket once the commands are sent, before a reply is read.
            first: called with the first reply, as the others may take long.

        Raises:
            redis.exceptions.RedisError: when the server does not reply. Some commands may have been executed
                then, as they may when this is cancelled.
        """
        await self.send(*commands)
        return await self.replies(first, sent)

    async def send(self, *commands: Sequence[Any]) -> None:
        """Send commands, without waiting for their replies: `replies` has to follow. Raises as `execute`."""
        self.in_use = True
        if self._connection is None:
            self._connection = self._pool.make_connection()
            # One timeout for the whole call; redis-py's own takes an asyncio task for each send.
            self._connection.socket_timeout = None
        try:
            async with asyncio.timeout(self._timeout):
                await self._pool.ensure_connection(self._connection)
                await self._connection.send_packed_command(self._connection.pack_commands(commands))
        except BaseException as error:
            await self._give_up(error)
            raise
        self._unread = len(commands)

    async def replies(
        self, first: Callable[[Any], None] | None = None, sent: Callable[[int], None] | None = None
    ) -> list[Any]:
        """Return the replies to the commands of `send`. See `execute`."""
        replies: list[Any] = []
        try:
            if sent is not None:
                sent(self._descriptor())
            async with asyncio.timeout(self._timeout):
                for _ in range(self._unread):
                    try:
                        replies.append(await self._connection.read_response())
                    except ResponseError as refusal:
                        replies.append(refusal)
                    if first is not None and len(replies) == 1:
                        first(replies[0])
        except BaseException as error:
            await self._give_up(error)
            raise
        self.in_use = False
        return replies

    async def _give_up(self, error: BaseException) -> None:
        """Close the connection after an error, or the next call would read the remaining replies."""
        self.in_use = False
        await self.close()
        if isinstance(error, TimeoutError):
            raise RedisTimeoutError("no reply in time") from None

    async def execute_command(self, *command: Any) -> Any:
        """Return the reply to one command; uses the pool while this connection is in use.

        Raises:
            redis.exceptions.RedisError: when the server refuses, or does not reply.
        """
        if self.in_use:
            return await self._redis.execute_command(*command)
        [reply] = await self.execute(command)
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def close(self) -> None:
        """Close the connection; the next call opens one."""
        if self._connection is None:
            return
        writer = self._connection._writer
        if writer is not None and not writer.is_closing():
            # Shut down now: both event loops close a socket only in their next round, and the system not while a
            # thread polls it. Until then, the server could execute a sent command whose reply is lost.
            with suppress(OSError), socket.socket(fileno=os.dup(self._descriptor())) as same:
                same.shutdown(socket.SHUT_RDWR)
        await self._connection.disconnect(nowait=True)

    def _descriptor(self) -> int:
        descriptor: int = self._connection._writer.get_extra_info("socket").fileno()
        return descriptor
