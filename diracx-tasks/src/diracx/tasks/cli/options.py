"""The options that several commands share."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Annotated

import typer

from .errors import CliError, UsageProblem, mask

NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="Registry name of the task: category:ClassName.")
]
ArgsOption = Annotated[
    str, typer.Option("--args", metavar="JSON", help="Positional arguments, a JSON list: '\\[1, \"x\"]'.")
]
KwargsOption = Annotated[
    str, typer.Option("--kwargs", metavar="JSON", help='Named arguments, a JSON object: \'{"vo": "lhcb"}\'.')
]
ModuleOption = Annotated[
    list[str] | None,
    typer.Option(
        "--module",
        metavar="FILE.py|PACKAGE.MODULE",
        help="Register the tasks of a plain module, under the category of its last name. May be repeated.",
    ),
]
RedisUrlOption = Annotated[
    str | None,
    typer.Option(
        "--redis-url",
        metavar="URL",
        help="Redis or Valkey server; else DIRACX_TASKS_REDIS_URL, else redis://localhost.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


class LogLevel(StrEnum):
    """How much is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


LogLevelOption = Annotated[LogLevel, typer.Option("--log-level", help="Least level of what is logged.")]


def resolve_redis_url(option: str | None) -> str:
    """The server's address: the option, else the environment, else `redis://localhost`.

    Raises:
        CliError: when it is no Redis URL; usage when it was given as an option.
    """
    from ..plumbing.binding import DEFAULT_REDIS_URL, REDIS_URL_VARIABLE

    if option is not None:
        url, origin = option, "--redis-url"
    else:
        url, origin = os.environ.get(REDIS_URL_VARIABLE) or DEFAULT_REDIS_URL, REDIS_URL_VARIABLE
    problem = _problem_of(url)
    if problem is None:
        return url
    message = f"{origin}: {mask(url)!r} {problem}; write redis://host:port/database, the database a number"
    raise UsageProblem(message) if option is not None else CliError(message)


def _problem_of(url: str) -> str | None:
    """Why this cannot be the address of a server. Says nothing of what may be a password."""
    from urllib.parse import urlsplit

    from redis.connection import parse_url

    try:
        parts = urlsplit(url)
        port_is_valid = parts.port is None or parts.port > 0
    except ValueError:
        return "has a malformed host or port"
    database = "" if parts.scheme == "unix" else parts.path.strip("/")
    problems = {
        "does not begin with redis://, rediss:// or unix://": parts.scheme not in ("redis", "rediss", "unix"),
        "has port 0": not port_is_valid,
        "has no host": parts.scheme != "unix" and not parts.hostname,
        f"names a database {database!r} that is no number": database and not database.isdecimal(),
    }
    problem = next((text for text, found in problems.items() if found), None)
    if problem is None:
        try:
            parse_url(url)
        except ValueError:
            return "has a parameter that cannot be read"
    return problem
