"""Makes clients of a server from its URL, blocking or not, for broker, lease keeper and CLI.

`address.py` parses the URL.
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

#: Detect a dead peer; the timeout is longer than any blocking read.
_DEFAULTS: Mapping[str, Any] = {
    "socket_connect_timeout": 5.0,
    "socket_timeout": 30.0,
    "socket_keepalive": True,
}
#: Options on which scripts and the parsing of replies depend.
_FIXED: Mapping[str, Any] = {"protocol": 2, "decode_responses": False}
#: Short timeout, to try the next sentinel soon when one is down.
_SENTINEL_SECONDS = 1.0


def async_client(url: str, *, max_connections: int | None = None, **options: Any) -> Redis:
    """Make a client for an event loop, without a connection so far.

    Args:
        max_connections: limit of connections for commands; callers wait for a free one. By default the limit in
            the URL, or none. Subscriptions have connections of their own.
        options: options of `redis.asyncio.Redis`; they take precedence over the URL.

    Raises:
        AddressError: when the URL is malformed.
        ValueError: when an option cannot be set.
    """
    from .clients import client_of

    address = _parse(url)
    if fixed := _FIXED.keys() & options.keys():
        raise ValueError(f"{min(fixed)} is fixed: leave it out")
    if max_connections is not None and max_connections < LEAST_CONNECTIONS:
        raise ValueError(f"{max_connections} connections are not enough: at least {LEAST_CONNECTIONS} are needed")
    options = _options(address, options)
    _check_tls(address, options)
    sentinel_options = _sentinel_options(address, options)
    return client_of(address, options, sentinel_options, max_connections or address.max_connections)


def sync_client(url: str, *, channels: bool = False, **options: Any) -> SyncRedis:
    """Make a blocking client, for a thread.

    Args:
        channels: use RESP3, so that a connection can receive messages of channels between commands.
    """
    from redis import Redis
    from redis.backoff import NoBackoff
    from redis.connection import Connection, ConnectionPool, SSLConnection, UnixDomainSocketConnection
    from redis.retry import Retry
    from redis.sentinel import Sentinel

    address = _parse(url)
    options = _options(address, options)
    if channels:
        options["protocol"] = 3
    if address.service:
        sentinel_options = {**_sentinel_options(address, options), "retry": Retry(NoBackoff(), 0)}
        sentinel = Sentinel(address.sentinels, sentinel_kwargs=sentinel_options)
        client: SyncRedis = sentinel.master_for(address.service, ssl=address.tls, **options)
        return client
    classes = (SSLConnection if address.tls else Connection, UnixDomainSocketConnection)
    return Redis.from_pool(ConnectionPool(connection_class=classes["path" in options], **options))


def _parse(url: str) -> Address:
    try:
        return parsed(url)
    except AddressError as error:
        raise AddressError(f"the URL of the broker {error}") from None


def _options(address: Address, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Options of connections to the server."""
    options = {**_DEFAULTS, **address.options, **overrides, **_FIXED}
    if "path" in options:
        del options["socket_keepalive"]
    return options


def _sentinel_options(address: Address, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of connections to sentinels, without retries: the next sentinel is tried instead."""
    return {
        "socket_connect_timeout": _SENTINEL_SECONDS,
        "socket_timeout": _SENTINEL_SECONDS,
        "ssl": address.tls,
        **{name: value for name, value in options.items() if name.startswith("ssl_")},
        **address.sentinel_options,
    }


def _check_tls(address: Address, options: Mapping[str, Any]) -> None:
    """Read the certificates, and log a warning about disabled checks.

    Raises:
        AddressError: when a certificate or an option cannot be used.
    """
    if not address.tls:
        return
    from redis.asyncio.connection import SSLConnection

    try:
        SSLConnection(**options).ssl_context.get()
    except Exception as error:  # an unreadable file, a bad certificate, an unknown version of TLS
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
