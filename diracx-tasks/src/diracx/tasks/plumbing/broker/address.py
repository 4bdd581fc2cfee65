"""Parser and checks of the address of a server.

    redis://[user:password@]host[:port][/database][?option=value]        valkey:// is the same
    rediss://…                                                           TLS; valkeys:// is the same
    unix://[user:password@]/path/of/socket[?db=number]
    redis+sentinel://[user:password@]host[:port],host[:port]…/service[/database][?option=value]

User and password are the server's; those of the sentinels are the options `sentinel_username` and
`sentinel_password`. `rediss+sentinel://` speaks TLS with both. Other options are those of redis-py's URLs that do
no harm: `OPTIONS`. Whatever changes what is sent, or what comes back, is fixed, and refused here.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from .._util.passwords import mask

REDIS_URL_VARIABLE = "DIRACX_TASKS_REDIS_URL"
#: Names a file that holds the URL, should the former not be set.
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
#: Connections for commands. One of them may wait for the next task.
LEAST_CONNECTIONS = 2
#: An answer that takes so long is no sign of a dead server.
_LEAST_TIMEOUT_SECONDS = 1.0


class AddressError(ValueError):
    """A text that cannot be the address of a server. The message shows no password."""


@dataclass(frozen=True)
class Address:
    """A server, or the sentinels that know it."""

    options: Mapping[str, Any]
    """Of connections to the server, as redis-py calls them."""
    tls: bool = False
    service: str = ""
    """The name by which the sentinels know the primary; empty: no sentinels."""
    sentinels: tuple[tuple[str, int], ...] = ()
    sentinel_options: Mapping[str, str] = field(default_factory=dict)
    max_connections: int | None = None
    """Connections for commands, at most."""


def check_url(url: str, origin: str) -> str:
    """The URL, when it can be the address of a server.

    Args:
        origin: the option or variable that it comes from.

    Raises:
        AddressError: what is wrong with it and what to write instead, in one line without the password.
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
        AddressError: when the file cannot be read, or what it says is no address.
    """
    if url := os.environ.get(REDIS_URL_VARIABLE):
        return check_url(url, REDIS_URL_VARIABLE)
    if path := os.environ.get(REDIS_URL_FILE_VARIABLE):
        return read_url_file(path, REDIS_URL_FILE_VARIABLE)
    return None


def read_url_file(path: str, origin: str) -> str:
    """The URL in a file, which holds nothing else. A file can be kept from other users, a command line cannot.

    Raises:
        AddressError: when the file cannot be read or is empty, or what it says is no address.
    """
    try:
        url = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise AddressError(f"{origin}: cannot read the file {path}: {reason}") from error
    if not url:
        raise AddressError(f"{origin}: the file {path} is empty")
    return check_url(url, origin)


def parsed(url: str) -> Address:
    """Parse the URL of a server.

    Raises:
        AddressError: what is wrong with it, to be read after the URL. Says nothing of what may be a password.
    """
    scheme, separator, rest = url.strip().partition("://")
    scheme = _ALIASES.get(scheme.lower(), scheme.lower())
    if not separator or scheme not in _FORMS:
        raise AddressError("does not begin with redis://, rediss://, unix:// or redis+sentinel://")
    if not re.fullmatch(r"[!-~]*", rest):
        raise AddressError("has a space or another character in it that must be written as %20 and so on")
    if "#" in rest:
        raise AddressError("has a # in it: write %23")
    place, _, query = rest.partition("?")
    said = _pairs(query)
    if scheme.endswith("+sentinel"):
        return _with_sentinels(scheme, place, said)
    host, port, options, path = _place(place, "a")
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
    return _address(scheme, options, said)


def _pairs(query: str) -> dict[str, str]:
    said: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name in said:
            raise AddressError(f"has the option {name!r} twice")
        if not value:
            raise AddressError(f"has the option {name!r} without a value")
        said[name] = value
    return said


def _place(text: str, article: str) -> tuple[str, int | None, dict[str, Any], str]:
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
    given = {"username": username, "password": password}
    return {name: unquote(value) for name, value in given.items() if value}


def _database(text: str) -> dict[str, int]:
    if text and not (text.isascii() and text.isdecimal()):
        raise AddressError(f"names a database {text!r} that is no number")
    return {"db": int(text)} if text else {}


def _with_sentinels(scheme: str, place: str, said: dict[str, str]) -> Address:
    credentials, _, rest = place.rpartition("@")
    username, _, password = credentials.partition(":")
    hosts, _, path = rest.partition("/")
    sentinels = tuple(_sentinel(host) for host in hosts.split(","))
    service, _, database = path.strip("/").partition("/")
    if not service:
        raise AddressError("has no name of a service after the sentinels")
    own = {name.removeprefix("sentinel_"): said.pop(name) for name in list(said) if name.startswith("sentinel_")}
    if unknown := own.keys() - {"username", "password"}:
        raise AddressError(f"has an unknown option {'sentinel_' + min(unknown)!r}")
    options = _credentials(username, password) | _database(database)
    return _address(scheme, options, said, service=unquote(service), sentinels=sentinels, sentinel_options=own)


def _sentinel(text: str) -> tuple[str, int]:
    host, port, _, _ = _place(text, "a sentinel with a")
    if not host:
        raise AddressError("has a sentinel without a host")
    return host, port or _SENTINEL_PORT


def _address(scheme: str, options: dict[str, Any], said: Mapping[str, str], **sentinels: Any) -> Address:
    tls = scheme.startswith("rediss")
    for name, text in said.items():
        if name not in OPTIONS:
            known = ", ".join(option for option in OPTIONS if tls or not option.startswith("ssl_"))
            raise AddressError(f"has the option {name!r}, which cannot be set: leave it out (known are {known})")
        if name in options:
            raise AddressError(f"says {name} twice")
        if name.startswith("ssl_") and not tls:
            raise AddressError(f"has the option {name}, but is no address with TLS: begin with rediss")
        if name == "socket_keepalive" and scheme == "unix":
            raise AddressError(
                f"has the option {name}, which a socket of this machine does not have: leave it out"
            )
        try:
            options[name] = OPTIONS[name](text)
        except ValueError as error:
            raise AddressError(f"has an option {name} that {error}") from None
    limit = options.pop("max_connections", None)
    if tls and options.get("ssl_cert_reqs") != "none":
        options.setdefault("ssl_check_hostname", True)  # older releases of redis-py do not
    return Address(options, tls, max_connections=limit, **sentinels)


# --- options ------------------------------------------------------------------------------------------------


def _number(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or len(text) > 9 or int(text) < least:
            raise ValueError(f"is no whole number of at least {least}")
        return int(text)

    return read


def _seconds(text: str) -> float:
    problem = f"is no number of seconds, {_LEAST_TIMEOUT_SECONDS:g} or more"
    try:
        seconds = float(text)
    except ValueError:
        raise ValueError(problem) from None
    if not (math.isfinite(seconds) and seconds >= _LEAST_TIMEOUT_SECONDS):
        raise ValueError(problem)
    return seconds


def _truth(text: str) -> bool:
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in known:
        raise ValueError("is neither true nor false")
    return known[text.lower()]


def _one_of(*values: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in values:
            raise ValueError(f"is none of {', '.join(values)}")
        return text

    return read


def _word(text: str) -> str:
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError("has a space, or a character that a server does not take")
    return text


def _readable(text: str) -> str:
    if not os.access(text, os.R_OK):
        raise ValueError("names a file or directory that cannot be read")
    return text


#: What a URL may say, and how it is read.
OPTIONS: Mapping[str, Callable[[str], Any]] = {
    "db": _number(0),
    "username": str,
    "password": str,
    "client_name": _word,
    "health_check_interval": _number(0),
    "max_connections": _number(LEAST_CONNECTIONS),
    "socket_connect_timeout": _seconds,
    "socket_keepalive": _truth,
    "socket_timeout": _seconds,
    "ssl_ca_certs": _readable,
    "ssl_ca_path": _readable,
    "ssl_cert_reqs": _one_of("none", "optional", "required"),
    "ssl_certfile": _readable,
    "ssl_check_hostname": _truth,
    "ssl_ciphers": str,
    "ssl_keyfile": _readable,
    "ssl_min_version": _number(0),
    "ssl_password": str,
}
