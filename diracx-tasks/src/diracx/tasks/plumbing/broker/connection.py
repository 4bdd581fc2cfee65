"""From the address of a server to clients of it, blocking or not: one way in for broker, lease keeper and CLI.

    redis://[user:password@]host[:port][/database][?option=value]        valkey:// is the same
    rediss://…                                                           TLS; valkeys:// is the same
    unix://[user:password@]/path/of/socket[?db=number]
    redis+sentinel://[user:password@]host[:port],host[:port]…/service[/database][?option=value]

User and password are the server's; those of the sentinels are the options `sentinel_username` and
`sentinel_password`. `rediss+sentinel://` speaks TLS with both. Other options are those of redis-py's URLs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from ..binding import REDIS_URL_FILE_VARIABLE, REDIS_URL_VARIABLE

if TYPE_CHECKING:
    from redis import Redis as SyncRedis
    from redis.asyncio import Redis

_ALIASES = {"valkey": "redis", "valkeys": "rediss", "valkey+sentinel": "redis+sentinel"}
_SENTINEL_SCHEMES = ("redis+sentinel", "rediss+sentinel")
_SENTINEL_PORT = 26379
#: A sentinel that is down must not keep us from asking the next one.
_SENTINEL_SECONDS = 1.0


class AddressError(ValueError):
    """A text that cannot be the address of a server. The message shows no password."""


@dataclass(frozen=True)
class _Address:
    url: str
    """What redis-py can read: the server, or with sentinels one that is never asked."""
    service: str = ""
    """The name by which the sentinels know the primary; empty: no sentinels."""
    sentinels: tuple[tuple[str, int], ...] = ()
    sentinel_options: Mapping[str, str] = field(default_factory=dict)


def check_url(url: str) -> None:
    """Whether this can be the address of a server.

    Raises:
        AddressError: what is wrong with it, to be read after the URL. Says nothing of what may be a password.
    """
    _parsed(url)


def async_client(url: str, **options: Any) -> Redis:
    """A client for an event loop. Opens no connection yet.

    Args:
        options: as those of `redis.asyncio.Redis`; they win over what the URL says.

    Raises:
        AddressError: when the URL cannot be used.
    """
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry
    from redis.asyncio.sentinel import Sentinel
    from redis.backoff import NoBackoff

    address = _usable(url)
    if not address.service:
        return Redis.from_url(address.url, **options)
    about_sentinels = _for_sentinels(address, Retry(NoBackoff(), 0))
    client: Redis = Sentinel(address.sentinels, sentinel_kwargs=about_sentinels).master_for(
        address.service, **_for_server(address, options)
    )
    return client


def sync_client(url: str, **options: Any) -> SyncRedis:
    """A blocking client: the same for a thread."""
    from redis import Redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry
    from redis.sentinel import Sentinel

    address = _usable(url)
    if not address.service:
        return Redis.from_url(address.url, **options)
    about_sentinels = _for_sentinels(address, Retry(NoBackoff(), 0))
    sentinel = Sentinel(address.sentinels, sentinel_kwargs=about_sentinels)
    client: SyncRedis = sentinel.master_for(address.service, **_for_server(address, options))
    return client


def redis_url_from_environment() -> str | None:
    """The server's address in DIRACX_TASKS_REDIS_URL, else in the file DIRACX_TASKS_REDIS_URL_FILE, else None.

    Raises:
        AddressError: when the file cannot be read.
    """
    if url := os.environ.get(REDIS_URL_VARIABLE):
        return url
    if path := os.environ.get(REDIS_URL_FILE_VARIABLE):
        return read_url_file(path)
    return None


def read_url_file(path: str) -> str:
    """The URL in a file, which holds nothing else. A file can be kept from other users, a command line cannot.

    Raises:
        AddressError: when the file cannot be read or is empty.
    """
    try:
        url = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise AddressError(f"cannot read the file {path}: {reason}") from error
    if not url:
        raise AddressError(f"the file {path} is empty")
    return url


def _usable(url: str) -> _Address:
    try:
        return _parsed(url)
    except AddressError as error:
        raise AddressError(f"the URL of the broker {error}") from None


def _parsed(url: str) -> _Address:
    scheme, separator, rest = url.partition("://")
    scheme = _ALIASES.get(scheme, scheme)
    url = scheme + separator + rest
    if separator and scheme in _SENTINEL_SCHEMES:
        return _with_sentinels(scheme, rest)
    if not separator or scheme not in ("redis", "rediss", "unix"):
        raise AddressError("does not begin with redis://, rediss://, unix:// or redis+sentinel://")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise AddressError("has a malformed host or port") from None
    if port == 0:
        raise AddressError("has port 0")
    if scheme == "unix":
        if not parts.path.strip("/"):
            raise AddressError("has no path of a socket")
    else:
        if not parts.hostname:
            raise AddressError("has no host")
        _check_database(parts.path.strip("/"))
    _check_options(url)
    return _Address(url)


def _with_sentinels(scheme: str, rest: str) -> _Address:
    """`[user:password@]host:port,host:port/service[/database][?options]`."""
    beginning, _, query = rest.partition("?")
    credentials, at, places = beginning.rpartition("@")
    hosts, _, path = places.partition("/")
    sentinels = tuple(_sentinel(host) for host in hosts.split(","))
    service, _, database = path.strip("/").partition("/")
    if not service:
        raise AddressError("has no name of a service after the sentinels")
    _check_database(database)
    options = parse_qsl(query, keep_blank_values=True)
    own = {name.removeprefix("sentinel_"): value for name, value in options if name.startswith("sentinel_")}
    if unknown := own.keys() - {"username", "password"}:
        raise AddressError(f"has an unknown option sentinel_{min(unknown)}")
    others = urlencode([(name, value) for name, value in options if not name.startswith("sentinel_")])
    server = f"{scheme.removesuffix('+sentinel')}://{credentials}{at}primary/{database}?{others}"
    _check_options(server)
    return _Address(server, service, sentinels, own)


def _sentinel(text: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        raise AddressError("has a sentinel with a malformed host or port") from None
    if not host:
        raise AddressError("has a sentinel without a host")
    if port == 0:
        raise AddressError("has a sentinel with port 0")
    return host, port or _SENTINEL_PORT


def _check_database(database: str) -> None:
    if database and not (database.isascii() and database.isdecimal()):
        raise AddressError(f"names a database {database!r} that is no number")


def _check_options(url: str) -> None:
    from redis.connection import parse_url

    try:
        options: Any = parse_url(url)
    except ValueError:
        raise AddressError("has a parameter that cannot be read") from None
    if "db" in dict(parse_qsl(urlsplit(url).query)) and not isinstance(options.get("db"), int):
        raise AddressError("names a database that is no number")


def _for_server(address: _Address, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of connections to the primary, wherever it is."""
    from redis.connection import parse_url

    said: dict[str, Any] = dict(parse_url(address.url))
    for place in ("host", "port", "connection_class"):
        said.pop(place, None)
    if address.url.startswith("rediss:"):
        said["ssl"] = True
    return {**said, **options}


def _for_sentinels(address: _Address, retry: object) -> dict[str, Any]:
    """The options of connections to sentinels. There are others to ask, so none is asked twice."""
    tls = {name: value for name, value in _for_server(address, {}).items() if name.startswith("ssl")}
    return {
        "socket_connect_timeout": _SENTINEL_SECONDS,
        "socket_timeout": _SENTINEL_SECONDS,
        "retry": retry,
        **tls,
        **address.sentinel_options,
    }
