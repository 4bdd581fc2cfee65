"""Errors of commands: one line that names the thing, the value and the way out."""

from __future__ import annotations

__all__ = [
    "CliError",
    "UsageProblem",
    "explained_database",
    "explained_redis",
    "mask",
    "one_line",
    "shortened",
    "shortened_line",
]

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..plumbing._util.passwords import mask
from ..plumbing._util.printable import printable_line
from ..plumbing.exceptions import SendTaskError

_LONGEST = 1000


class CliError(Exception):
    """Something the user can mend. Shown as one line, without a traceback.

    Args:
        message: what, which value, and the way out.
        exit_code: 2 when the command line itself is wrong, else 1.
        detail: shown as it is before the line, as the traceback of a task.
        lines: several messages, one for each mistake, in place of the one.
    """

    def __init__(
        self, message: str, *, exit_code: int = 1, detail: str = "", lines: Sequence[str] | None = None
    ) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.detail = detail
        self.lines = lines or [message]


class UsageProblem(CliError):
    """What was typed cannot be meant."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=2)


def one_line(text: str) -> str:
    """The text on one line, not too long, without passwords and without what would steer a terminal."""
    line = printable_line(mask(text, 8 * _LONGEST))
    return line if len(line) <= _LONGEST else line[:_LONGEST] + "…"


def shortened_line(text: str, longest: int) -> str:
    """The beginning of the text on one line, as `one_line` makes it."""
    line = one_line(text)
    return line if len(line) <= longest else line[:longest] + "…"


def shortened(value: str, longest: int = 60) -> str:
    """A value for use inside a message, in quotes."""
    return repr(value if len(value) <= longest else value[:longest] + "…")


@contextmanager
def explained_redis(url: str) -> Iterator[None]:
    """Turn what the server, or the way to it, does wrong inside the block into one line.

    Raises:
        CliError: in place of every error of redis-py, and of the broker when it comes from one.
    """
    from redis.exceptions import RedisError

    from ..plumbing.broker.address import AddressError
    from ..plumbing.broker.server_check import UnusableServerError
    from ..plumbing.broker.stored import UnreadableKeyError

    try:
        yield
    except AddressError as error:
        raise CliError(f"{error}; correct --redis-url or DIRACX_TASKS_REDIS_URL") from error
    except (UnreadableKeyError, UnusableServerError) as error:
        raise CliError(str(error)) from error
    except SendTaskError as error:
        if isinstance(error.__cause__, RedisError):
            raise CliError(_about_redis(error.__cause__, url)) from error
        raise CliError(str(error)) from error
    except RedisError as error:
        raise CliError(_about_redis(error, url)) from error


@contextmanager
def explained_database(name: str) -> Iterator[None]:
    """Turn what an SQL database does wrong inside the block into one line.

    Raises:
        CliError: in place of every error that comes from a database.
    """
    from sqlalchemy.exc import SQLAlchemyError

    from ..plumbing.sql.errors import DatabaseError, describe
    from ..plumbing.sql.migrations import MigrationError

    try:
        yield
    except DatabaseError as error:
        raise CliError(error.detail) from error
    except MigrationError as error:
        raise CliError(str(error)) from error
    except SQLAlchemyError as error:
        if (described := describe(name, error)) is not None:
            raise CliError(str(described)) from error
        # Without the statement.
        raise CliError(f"the database {name} refuses this: {getattr(error, 'orig', None) or error}") from error


def _about_redis(error: BaseException, url: str) -> str:
    from redis.exceptions import (
        AuthenticationError,
        AuthorizationError,
        ConnectionError,
        InvalidResponse,
        NoPermissionError,
        TimeoutError,
    )

    from ..plumbing._util.retrying import NO_PRIMARY, reason

    text = reason(error)
    where = f"Redis at {mask(url)}"
    if isinstance(error, AuthenticationError | AuthorizationError) or text.startswith(("NOAUTH", "WRONGPASS")):
        return (
            f"{where} refuses the user or the password: {text}; "
            "check them in --redis-url or DIRACX_TASKS_REDIS_URL"
        )
    if isinstance(error, NoPermissionError):
        return f"{where} does not allow this to its user: {text}; give the user the rights on diracx:*"
    if isinstance(error, InvalidResponse):
        return f"what answers at {mask(url)} is no Redis server ({text}); check host and port of the URL"
    if "DB index" in text:
        return f"{where} has no such database: {text}; correct the number at the end of the URL"
    if isinstance(error, ConnectionError | TimeoutError):
        if isinstance(error, NO_PRIMARY):
            way_out = "check the sentinels' hosts and ports, and the name of the service"
        elif "CERTIFICATE_VERIFY_FAILED" in text:
            way_out = "name its CA with ?ssl_ca_certs=FILE, and the host as its certificate does"
        else:
            way_out = (
                "start it, or name another one with --redis-url or DIRACX_TASKS_REDIS_URL (`diracx-task-run dev` "
                "brings its own)"
            )
        return f"cannot reach {where}: {text}; {way_out}"
    return f"{where} refuses: {text}; check --redis-url or DIRACX_TASKS_REDIS_URL"
