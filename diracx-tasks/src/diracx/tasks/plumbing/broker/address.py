"""Parses and checks the URL of a server.

    redis://[user:password@]host[:port][/database][?option=value]        valkey:// is the same
    rediss://…                                                           TLS; valkeys:// is the same
    unix://[user:password@]/path/of/socket[?db=number]
    redis+sentinel://[user:password@]host[:port],host[:port]…/service[/database][?option=value]

User and password are the server's; those of the sentinels are the options `sentinel_username` and
`sentinel_password`. `rediss+sentinel://` uses TLS for both. `OPTIONS` lists the other options, a part of those of
redis-py's URLs. Options that change commands or replies (encoding, protocol) are fixed, and refused here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from .._util.passwords import mask

REDIS_URL_VARIABLE = "DIRACX_TASKS_REDIS_URL"
#: Name of a file that holds the URL, used when REDIS_URL_VARIABLE is not set.
REDIS_URL_FILE_VARIABLE = "DIRACX_TASKS_REDIS_URL_FILE"
DEFAULT_REDIS_URL = "redis://localhost"
_ALIASES = {"valkey": "redis", "valkeys": "rediss", "valkey+sentinel": "redis+sentinel"}
_ALIASES["valkeys+sentinel"] = "rediss+sentinel"
_FORMS = {
    "redis": "redis://host:port/database?option=value",
    "rediss": "rediss://host:port/database?option=value",
    "unix": "unix:///path/of/socket?db=number",
    "redis+sentinel": "redis+sentinel://host:port,host:port/service/database?option=value",
    "rediss+sentinel": "rediss+sentinel://host:port,host:port/service/database?option=value",
}
_SENTINEL_PORT = 26379
#: Fewest connections for commands: one of them may be blocked in a wait for the next task.
LEAST_CONNECTIONS = 2
#: Shortest timeout: a live server may take this long to reply.
_LEAST_TIMEOUT_SECONDS = 1.0


class AddressError(ValueError):
    """The URL of a server is malformed. The message shows no password."""


@dataclass(frozen=True)
class Address:
    """Address of a server, or of the sentinels that monitor it."""

    options: Mapping[str, Any]
    """Options of connections to the server, by redis-py's names."""
    tls: bool = False
    service: str = ""
    """Name of the primary at the sentinels; empty: no sentinels."""
    sentinels: tuple[tuple[str, int], ...] = ()
    sentinel_options: Mapping[str, str] = field(default_factory=dict)
    max_connections: int | None = None
    """Limit of connections for commands."""


def check_url(url: str, origin: str) -> str:
    """Return the URL if it is valid.

    Args:
        origin: the option or variable that it comes from.

    Raises:
        AddressError: names the mistake and the correct form, in one line without the password.
    """
    try:
        parsed(url)
    except AddressError as error:
        scheme = url.strip().partition("://")[0].lower()
        form = _FORMS.get(_ALIASES.get(scheme, scheme), _FORMS["redis"])
        shown, mark, query = mask(url).partition("?")
        query = re.sub("=[^&]*", "=***", query)  # a password may be behind a mistyped name
        raise AddressError(f"{origin}: {shown + mark + query!r} {error}; write {form}") from None
    return url


def redis_url_from_environment() -> str | None:
    """The server's address in DIRACX_TASKS_REDIS_URL, else in the file DIRACX_TASKS_REDIS_URL_FILE, else None.

    Raises:
        AddressError: when the file cannot be read, or the URL is malformed.
    """
    if url := os.environ.get(REDIS_URL_VARIABLE):
        return check_url(url, REDIS_URL_VARIABLE)
    if path := os.environ.get(REDIS_URL_FILE_VARIABLE):
        return read_url_file(path, REDIS_URL_FILE_VARIABLE)
    return None


def read_url_file(path: str, origin: str) -> str:
    """Read the URL from a file that holds nothing else: other users can read a command line, but not the file.

    Raises:
        AddressError: when the file cannot be read or is empty, or the URL is malformed.
    """
    try:
        url = Path(path).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise AddressError(f"{origin}: cannot read the file {path}: {reason}") from error
    if not url:
        raise AddressError(f"{origin}: the file {path} is empty")
    return check_url(url, origin)


def parsed(url: str) -> Address:
    """Parse the URL of a server.

    Raises:
        AddressError: names the mistake, as a phrase that follows the URL, without any part that may be a password.
    """
    scheme, separator, remainder = url.strip().partition("://")
    scheme = _ALIASES.get(scheme.lower(), scheme.lower())
    if not separator or scheme not in _FORMS:
        raise AddressError("does not begin with redis://, rediss://, unix:// or redis+sentinel://")
    if not re.fullmatch(r"[!-~]*", remainder):
        raise AddressError("has a space or another character in it that must be written as %20 and so on")
    if "#" in remainder:
        raise AddressError("has a # in it: write %23")
    location, _, query = remainder.partition("?")
    query_options = _pairs(query)
    if scheme.endswith("+sentinel"):
        return _with_sentinels(scheme, location, query_options)
    host, port, options, path = _split_location(location, "a")
    if scheme == "unix":
        if host or port is not None:
            raise AddressError("has a host: the path of a socket begins with a third /")
        if not path.strip("/"):
            raise AddressError("has no path of a socket")
        options["path"] = unquote(path)
    else:
        if not host:
            raise AddressError("has no host")
        options |= {"host": host} | ({} if port is None else {"port": port}) | _database(path.strip("/"))
    return _address(scheme, options, query_options)


def _pairs(query: str) -> dict[str, str]:
    query_options: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name in query_options:
            raise AddressError(f"has the option {name!r} twice")
        if not value:
            raise AddressError(f"has the option {name!r} without a value")
        query_options[name] = value
    return query_options


def _split_location(text: str, article: str) -> tuple[str, int | None, dict[str, Any], str]:
    """Host, port, credentials and path."""
    try:
        parts = urlsplit(f"//{text}")
        host, port = unquote(parts.hostname or ""), parts.port
    except ValueError:
        raise AddressError(
            f"has {article} malformed host or port (write an IPv6 address in [], and / ? # @ of a password as "
            "%2F %3F %23 %40)"
        ) from None
    if port == 0:
        raise AddressError(f"has {article} port 0".replace("a port", "port"))
    return host, port, _credentials(parts.username, parts.password), parts.path


def _credentials(username: str | None, password: str | None) -> dict[str, Any]:
    credentials = {"username": username, "password": password}
    return {name: unquote(value) for name, value in credentials.items() if value}


def _database(text: str) -> dict[str, int]:
    if text and not (text.isascii() and text.isdecimal()):
        raise AddressError(f"names a database {text!r} that is no number")
    return {"db": int(text)} if text else {}


def _with_sentinels(scheme: str, location: str, query_options: dict[str, str]) -> Address:
    credentials, _, remainder = location.rpartition("@")
    username, _, password = credentials.partition(":")
    hosts, _, path = remainder.partition("/")
    sentinels = tuple(_sentinel(host) for host in hosts.split(","))
    service, _, database = path.strip("/").partition("/")
    if not service:
        raise AddressError("has no name of a service after the sentinels")
    own = {
        name.removeprefix("sentinel_"): query_options.pop(name)
        for name in list(query_options)
        if name.startswith("sentinel_")
    }
    if unknown := own.keys() - {"username", "password"}:
        raise AddressError(f"has an unknown option {'sentinel_' + min(unknown)!r}")
    options = _credentials(username, password) | _database(database)
    return _address(
        scheme, options, query_options, service=unquote(service), sentinels=sentinels, sentinel_options=own
    )


def _sentinel(text: str) -> tuple[str, int]:
    host, port, _, _ = _split_location(text, "a sentinel with a")
    if not host:
        raise AddressError("has a sentinel without a host")
    return host, port or _SENTINEL_PORT


def _address(scheme: str, options: dict[str, Any], query_options: Mapping[str, str], **sentinels: Any) -> Address:
    tls = scheme.startswith("rediss")
    for name, text in query_options.items():
        if name not in OPTIONS:
            known = ", ".join(option for option in OPTIONS if tls or not option.startswith("ssl_"))
            raise AddressError(f"has the option {name!r}, which cannot be set: leave it out (known are {known})")
        if name in options:
            raise AddressError(f"has the option {name} twice")
        if name.startswith("ssl_") and not tls:
            raise AddressError(f"has the option {name}, but is no address with TLS: begin with rediss")
        if name == "socket_keepalive" and scheme == "unix":
            raise AddressError(
                f"has the option {name}, which a socket of this machine does not have: leave it out"
            )
        try:
            options[name] = TypeAdapter(OPTIONS[name]).validate_python(text)
        except ValidationError as error:
            problem = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise AddressError(f"has a wrong value of the option {name} ({problem})") from None
    limit = options.pop("max_connections", None)
    if tls and options.get("ssl_cert_reqs") != "none":
        options.setdefault("ssl_check_hostname", True)  # older releases of redis-py default to False
    return Address(options, tls, max_connections=limit, **sentinels)


# --- options ------------------------------------------------------------------------------------------------


def _visible_ascii(text: str) -> str:
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError("it has a space, or a character that a server does not take")
    return text


def _readable(text: str) -> str:
    if not os.access(text, os.R_OK):
        raise ValueError("it names a file or directory that cannot be read")
    return text


_Number = Annotated[int, Field(ge=0, lt=10**9)]
_Seconds = Annotated[float, Field(ge=_LEAST_TIMEOUT_SECONDS, allow_inf_nan=False)]
_Readable = Annotated[str, AfterValidator(_readable)]

#: Options of a URL, each with its type.
OPTIONS: Mapping[str, Any] = {
    "db": _Number,
    "username": str,
    "password": str,
    "client_name": Annotated[str, AfterValidator(_visible_ascii)],
    "health_check_interval": _Number,
    "max_connections": Annotated[_Number, Field(ge=LEAST_CONNECTIONS)],
    "socket_connect_timeout": _Seconds,
    "socket_keepalive": bool,
    "socket_timeout": _Seconds,
    "ssl_ca_certs": _Readable,
    "ssl_ca_path": _Readable,
    "ssl_cert_reqs": Literal["none", "optional", "required"],
    "ssl_certfile": _Readable,
    "ssl_check_hostname": bool,
    "ssl_ciphers": str,
    "ssl_keyfile": _Readable,
    "ssl_min_version": _Number,
    "ssl_password": str,
}
