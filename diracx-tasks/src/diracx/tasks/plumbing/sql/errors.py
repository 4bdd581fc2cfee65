"""Classifies errors of SQL databases by their remedy.

Error codes are from the manuals of MySQL, MariaDB, PostgreSQL (appendix A) and SQLite (`rescode.html`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

from diracx.db.exceptions import DBUnavailableError
from diracx.db.sql.utils import SQLDBUnavailableError
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    InvalidRequestError,
    NotSupportedError,
    ProgrammingError,
    SQLAlchemyError,
)

from .._util.passwords import mask


class ErrorKind(StrEnum):
    """Kind of an error of a database, by its remedy."""

    CONFLICT = "conflict"
    """Repeat the transaction: deadlock, lock wait, serialisation failure, busy SQLite file."""
    AWAY = "away"
    """Wait: the server does not respond or cannot work (starting, read-only, full)."""
    SETUP = "setup"
    """Correct the configuration: credentials, rights, unknown database, unusable file."""
    NOT_READY = "not ready"
    """Create or upgrade tables or columns."""
    REFUSED = "refused"
    """None: the database refuses the statement or the row."""


class DatabaseError(SQLDBUnavailableError):
    """A database is unavailable; the message has reason and remedy in one line.

    DiracX responds with 503. The error of the driver, which may have users and hosts, is its `__cause__`.

    Args:
        message: reason and remedy, without secrets.
        kind: kind of the error.
    """

    def __init__(self, message: str, kind: ErrorKind) -> None:
        super().__init__(message)
        self.kind = kind

    @property
    def detail(self) -> str:
        """Message with that of the driver, for operators."""
        cause = self.__cause__
        if cause is None or isinstance(cause, TimeoutError):
            return str(self)
        message = " ".join(mask(str(_original(cause)) or type(cause).__name__).split())[:300]
        return f"{self} (error: {message})"


_MYSQL = {
    # 1305: savepoint of a transaction that a deadlock has ended. 1020, 3101: snapshot isolation of MariaDB, group
    # replication.
    ErrorKind.CONFLICT: {1020, 1205, 1213, 1305, 1412, 3101},
    ErrorKind.SETUP: {1044, 1045, 1049, 1142, 1143, 1227, 1251, 1524, 1698, 2059},
    ErrorKind.NOT_READY: {1054, 1146},
    ErrorKind.REFUSED: {1048, 1062, 1064, 1071, 1118, 1153, 1162, 1300, 1301, 1366, 1406, 1451, 1452, 4025},
}
_POSTGRESQL = {  # all others: AWAY
    ErrorKind.CONFLICT: ("40", "55P03"),
    ErrorKind.NOT_READY: ("42P01", "42703"),
    ErrorKind.SETUP: ("28", "3D", "3F", "42501"),
    ErrorKind.REFUSED: ("0A", "21", "22", "23", "42", "54"),
}
_SQLITE = {  # all others: REFUSED
    ErrorKind.CONFLICT: {5, 6},  # BUSY, LOCKED
    ErrorKind.SETUP: {3, 8, 11, 14, 23, 26},  # PERM, READONLY, CORRUPT, CANTOPEN, AUTH, NOTADB
    ErrorKind.AWAY: {7, 9, 10, 13},  # NOMEM, INTERRUPT, IOERR, FULL
}
_SQLITE_LACKS = ("no such table", "no such column", "has no column named")

_MESSAGES = {
    ErrorKind.CONFLICT: "the database {0} is busy: every attempt conflicted with other transactions; repeat it",
    ErrorKind.AWAY: "cannot reach the database {0}: check that it runs, and {1}",
    ErrorKind.SETUP: "the database {0} cannot be used: check user, password, name and rights in {1}",
    ErrorKind.NOT_READY: "the database {0} lacks a table or a column: create or upgrade them, or correct {1}",
}
_MESSAGES_BY_CODE: dict[int | str | None, str] = {
    **dict.fromkeys((1049, "3D000"), "the database {0} does not exist on its server: create it, or correct {1}"),
    **dict.fromkeys(
        (1045, 1698, "28P01", "28000"), "the database {0} refuses the user or the password: correct {1}"
    ),
    8: "the file of the database {0} cannot be written: check its rights, and {1}",
    11: "the file of the database {0} is corrupt: restore it from a backup, or correct {1}",
    14: "the file of the database {0} cannot be opened: check its directory and its rights, and {1}",
    26: "the file of the database {0} is not an SQLite database: correct {1}",
}


_UNUSABLE_URL = (ArgumentError, InvalidRequestError, ModuleNotFoundError)


def classify(error: BaseException) -> ErrorKind | None:
    """Return the kind of an error; None if it is not from a database."""
    if isinstance(error, DatabaseError):
        return error.kind
    if isinstance(error, DBUnavailableError):
        return ErrorKind.AWAY if error.__cause__ is None else classify(error.__cause__) or ErrorKind.AWAY
    if isinstance(error, OSError | EOFError):
        return ErrorKind.AWAY
    code = _code(error)
    if isinstance(code, str):
        kinds = (kind for kind, prefixes in _POSTGRESQL.items() if code.startswith(prefixes))
        return next(kinds, ErrorKind.AWAY)
    if code is not None and (found := _by_number(_original(error), code)) is not None:
        return found
    return _by_class(error)


def is_cut_off(error: BaseException) -> bool:
    """Return whether the connection was lost: the server is down, or has closed it after an invalid packet."""
    if isinstance(error, DatabaseError) and error.__cause__ is not None:
        error = error.__cause__
    lost = isinstance(error, OSError | EOFError) or getattr(error, "connection_invalidated", False)
    return lost or _code(error) in (2006, 2013)


def _by_number(original: BaseException, code: int) -> ErrorKind | None:
    if not hasattr(original, "sqlite_errorcode"):
        return next((kind for kind, codes in _MYSQL.items() if code in codes), None)
    if str(original).startswith("no such table") or any(words in str(original) for words in _SQLITE_LACKS):
        return ErrorKind.NOT_READY
    return next((kind for kind, codes in _SQLITE.items() if code in codes), ErrorKind.REFUSED)


def _by_class(error: BaseException) -> ErrorKind | None:
    if isinstance(error, _UNUSABLE_URL):
        return ErrorKind.SETUP
    if not isinstance(error, SQLAlchemyError):
        # Errors of asyncpg while it connects.
        return ErrorKind.AWAY if type(error).__module__.startswith("asyncpg.") else None
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return ErrorKind.AWAY
    if isinstance(error, DataError | IntegrityError | NotSupportedError | ProgrammingError):
        return ErrorKind.REFUSED
    # asyncpg could not encode a value.
    return ErrorKind.REFUSED if isinstance(_original(error).__cause__, ValueError) else ErrorKind.AWAY


def _original(error: BaseException) -> Any:
    return getattr(error, "orig", None) or error


def _code(error: BaseException) -> int | str | None:
    """Return the SQLSTATE of PostgreSQL, the number of MySQL, or the primary number of SQLite."""
    original = _original(error)
    if type(original).__module__.startswith("pymysql"):
        number = original.args[0] if original.args else None
        return number if isinstance(number, int) else None
    if isinstance(state := getattr(original, "sqlstate", None), str):
        return state
    if isinstance(number := getattr(original, "sqlite_errorcode", None), int):
        return number & 0xFF
    return None


def describe(database: str, error: BaseException) -> DatabaseError | None:
    """Make a `DatabaseError` for an error of this database (`TaskDB`); None if the statement is the problem."""
    kind = classify(error)
    if kind is None or kind is ErrorKind.REFUSED:
        return None
    if isinstance(error, DatabaseError):
        return error
    message = _MESSAGES[kind]
    if kind is ErrorKind.SETUP:
        message = _MESSAGES_BY_CODE.get(_code(error), message)
    if isinstance(error, _UNUSABLE_URL):
        return unusable_url(database, error)
    return DatabaseError(message.format(database, _variable(database)), kind)


def unusable_url(database: str, error: BaseException) -> DatabaseError:
    """Make the error for a URL that the driver cannot use, or whose driver is not installed."""
    driver = error.name if isinstance(error, ModuleNotFoundError) else None
    package = {"asyncpg": "'diracx-tasks[postgresql]'"}.get(str(driver), driver)
    remedy = f"its driver is not installed: pip install {package}, or correct" if driver else "correct"
    return DatabaseError(
        f"the database {database} has no usable URL: {remedy} {_variable(database)}", ErrorKind.SETUP
    )


def _variable(database: str) -> str:
    return f"DIRACX_DB_URL_{database.upper()}"


@contextmanager
def explained(database: str) -> Iterator[None]:
    """Convert errors of the database inside the block to a `DatabaseError`, except those of statements."""
    try:
        yield
    except Exception as error:
        if (described := describe(database, error)) is None or described is error:
            raise
        raise described from error


@contextmanager
def connecting(database: str) -> Iterator[None]:
    """Convert all errors of a block that opens a connection to a `DatabaseError`; by default that of the URL."""
    try:
        yield
    except DatabaseError:
        raise
    except Exception as error:
        raise (describe(database, error) or unusable_url(database, error)) from error
