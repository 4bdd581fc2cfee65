"""Clients of one server for an event loop, whose connections may be few."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from .address import Address


class _LimitedSentinelPool(SentinelConnectionPool, BlockingConnectionPool):
    """A pool of connections to the primary where callers wait for a free one."""


class _LimitedClient(Redis):
    """What listens to channels has a connection beside the pool: it would keep one from all others for ever."""

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


def _pool(
    address: Address, options: Mapping[str, Any], of_sentinels: Mapping[str, Any], **limit: Any
) -> ConnectionPool:
    if address.service:
        sentinel_pool: Any = _LimitedSentinelPool if limit else SentinelConnectionPool
        sentinel = Sentinel(address.sentinels, sentinel_kwargs={**of_sentinels, "retry": Retry(NoBackoff(), 0)})
        pool: ConnectionPool = sentinel_pool(address.service, sentinel, ssl=address.tls, **options, **limit)
        return pool
    if "path" in options:
        connection_class: type[Any] = UnixDomainSocketConnection
    else:
        connection_class = SSLConnection if address.tls else Connection
    return (BlockingConnectionPool if limit else ConnectionPool)(
        connection_class=connection_class, **options, **limit
    )
