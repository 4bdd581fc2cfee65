"""Errors of SQL databases are classified by what resolves them."""

from __future__ import annotations

import sqlite3
from typing import Any

import pytest
from diracx.tasks.plumbing.sql.errors import DatabaseError, ErrorKind, classify, describe
from pymysql import err
from sqlalchemy import exc

T = ErrorKind


class AsyncpgError(Exception):
    def __init__(self, sqlstate: str) -> None:
        super().__init__("words of the driver")
        self.sqlstate = sqlstate


def of_mysql(code: int) -> exc.DBAPIError:
    return exc.OperationalError("SELECT 'secret'", {}, err.OperationalError(code, "words of the driver"))


def of_postgresql(sqlstate: str) -> exc.DBAPIError:
    return exc.DBAPIError("SELECT 'secret'", {}, AsyncpgError(sqlstate))


def of_sqlite(code: int, words: str = "words of the driver") -> exc.DBAPIError:
    error: Any = sqlite3.OperationalError(words)
    error.sqlite_errorcode = code
    return exc.OperationalError("SELECT 'secret'", {}, error)


CLASSIFIED = [
    *((of_mysql(code), T.CONFLICT) for code in (1213, 1205, 1020, 1305)),
    *((of_mysql(code), T.AWAY) for code in (2003, 2006, 2013, 1040, 1053, 1114, 1290)),
    *((of_mysql(code), T.SETUP) for code in (1044, 1045, 1049, 1142)),
    *((of_mysql(code), T.NOT_READY) for code in (1054, 1146)),
    *((of_mysql(code), T.REFUSED) for code in (1062, 1153, 1366, 1406, 4025)),
    *((of_postgresql(state), T.CONFLICT) for state in ("40001", "40P01", "55P03")),
    *((of_postgresql(state), T.AWAY) for state in ("08006", "25006", "53100", "53300", "57P01", "57P03", "XX000")),
    *((of_postgresql(state), T.SETUP) for state in ("28P01", "28000", "3D000", "42501")),
    *((of_postgresql(state), T.NOT_READY) for state in ("42P01", "42703")),
    *((of_postgresql(state), T.REFUSED) for state in ("22001", "22021", "22P05", "23505", "54000", "42804")),
    # With SQLite's extended codes: BUSY_SNAPSHOT, IOERR_FSYNC, READONLY_DIRECTORY.
    *((of_sqlite(code), T.CONFLICT) for code in (5, 6, 517)),
    *((of_sqlite(code), T.AWAY) for code in (10, 13, 1034)),
    *((of_sqlite(code), T.SETUP) for code in (8, 11, 14, 26, 1544)),
    *((of_sqlite(code), T.REFUSED) for code in (18, 19, 1)),
    *((of_sqlite(1, f"no such {what}: x"), T.NOT_READY) for what in ("table", "column")),
    *((error, T.AWAY) for error in (ConnectionRefusedError(111, "x"), TimeoutError(), EOFError())),
    (exc.ArgumentError("x"), T.SETUP),
    *((error, None) for error in (ValueError("x"), KeyError("x"), AssertionError())),
]


@pytest.mark.parametrize(("error", "kind"), CLASSIFIED)
def test_errors_are_classified_by_their_codes(error: BaseException, kind: ErrorKind | None) -> None:
    assert classify(error) is kind
    description = describe("TaskDB", error)
    if kind in (None, T.REFUSED):
        assert description is None
        return
    assert isinstance(description, DatabaseError)
    assert (description.kind, classify(description)) == (kind, kind)
    description.__cause__ = error
    assert "TaskDB" in str(description)
    assert "words of the driver" not in str(description)
    assert "secret" not in description.detail
    assert len(description.detail.splitlines()) == 1
