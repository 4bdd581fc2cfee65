"""From the address of a server to clients of it, blocking or not: one way in for broker, lease keeper and CLI.

Addresses are read in `address.py`.
"""

from __future__ import annotations

__all__ = [
    "AddressError",
    "async_client",
    "check_url",
    "read_url_file",
    "redis_url_from_environment",
    "sync_client",
]

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .address import (
    LEAST_CONNECTIONS,
    Address,
    AddressError,
    check_url,
    parsed,
    read_url_file,
    redis_url_from_environment,
)

if TYPE_CHECKING:
    from redis import Redis as SyncRedis
    from redis.asyncio import Redis

logger = logging.getLogger(__name__)

#: A dead peer is noticed; the time-out is longer than any call that blocks on purpose.
_DEFAULTS: Mapping[str, Any] = {
    "socket_connect_timeout": 5.0,
    "socket_timeout": 30.0,
    "socket_keepalive": True,
}
#: What scripts and replies rely on.
_FIXED: Mapping[str, Any] = {"protocol": 2, "decode_responses": False}
#: A sentinel that is down must not keep us from asking the next one.
_SENTINEL_SECONDS = 1.0


def async_client(url: str, *, max_connections: int | None = None, **options: Any) -> Redis:
    """A client for an event loop. Opens no connection yet.

    Args:
        max_connections: for commands; who needs one more waits for it. By default what the URL says, or any
            number. What listens to channels has a connection of its own.
        options: as those of `redis.asyncio.Redis`; they win over what the URL says.

    Raises:
        AddressError: when the URL cannot be used.
        ValueError: when an option cannot be.
    """
    from .clients import client_of

    address = _usable(url)
    if fixed := _FIXED.keys() & options.keys():
        raise ValueError(f"{min(fixed)} is fixed: leave it out")
    if max_connections is not None and max_connections < LEAST_CONNECTIONS:
        raise ValueError(f"{max_connections} connections are not enough: at least {LEAST_CONNECTIONS} are needed")
    options = _options(address, options)
    _check_tls(address, options)
    return client_of(address, options, _of_sentinels(address, options), max_connections or address.max_connections)


def sync_client(url: str, *, channels: bool = False, **options: Any) -> SyncRedis:
    """A blocking client: the same for a thread.

    Args:
        channels: whether its connections may listen to channels between commands: they speak RESP3.
    """
    from redis import Redis
    from redis.backoff import NoBackoff
    from redis.connection import Connection, ConnectionPool, SSLConnection, UnixDomainSocketConnection
    from redis.retry import Retry
    from redis.sentinel import Sentinel

    address = _usable(url)
    options = _options(address, options)
    if channels:
        options["protocol"] = 3
    if address.service:
        of_sentinels = {**_of_sentinels(address, options), "retry": Retry(NoBackoff(), 0)}
        sentinel = Sentinel(address.sentinels, sentinel_kwargs=of_sentinels)
        client: SyncRedis = sentinel.master_for(address.service, ssl=address.tls, **options)
        return client
    kinds = (SSLConnection if address.tls else Connection, UnixDomainSocketConnection)
    return Redis.from_pool(ConnectionPool(connection_class=kinds["path" in options], **options))


def _usable(url: str) -> Address:
    try:
        return parsed(url)
    except AddressError as error:
        raise AddressError(f"the URL of the broker {error}") from None


def _options(address: Address, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of connections to the server."""
    options = {**_DEFAULTS, **address.options, **given, **_FIXED}
    if "path" in options:
        del options["socket_keepalive"]
    return options


def _of_sentinels(address: Address, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of connections to sentinels. There are others to ask, so none is asked twice."""
    return {
        "socket_connect_timeout": _SENTINEL_SECONDS,
        "socket_timeout": _SENTINEL_SECONDS,
        "ssl": address.tls,
        **{name: value for name, value in options.items() if name.startswith("ssl_")},
        **address.sentinel_options,
    }


def _check_tls(address: Address, options: Mapping[str, Any]) -> None:
    """Read the certificates now, and say what is not checked.

    Raises:
        AddressError: when they cannot be used.
    """
    if not address.tls:
        return
    from redis.asyncio.connection import SSLConnection

    try:
        SSLConnection(**options).ssl_context.get()
    except Exception as error:  # of files, of their contents, of numbers that mean no version
        raise AddressError(f"the URL of the broker has options of TLS that cannot be used: {error}") from error
    if options.get("ssl_cert_reqs") == "none":
        unchecked = (
            "certificate of the server, by ssl_cert_reqs=none: a machine in between can read and change all"
        )
    elif not options["ssl_check_hostname"]:
        unchecked = "name in the certificate, by ssl_check_hostname: any server with a good certificate will do"
    else:
        return
    logger.warning("the URL of the broker switches off the check of the %s", unchecked)
