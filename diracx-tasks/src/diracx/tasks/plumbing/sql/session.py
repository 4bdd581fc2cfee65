"""Sessions with an SQL database: transactions that are repeated when the server ends them, connections, errors."""

from __future__ import annotations

__all__ = ["Database", "not_ready", "prepare", "transaction"]

import asyncio
import contextlib
import functools
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, ParamSpec, Self, TypeVar

from diracx.db.sql.utils import BaseSQLDB
from sqlalchemy import Connection, event, inspect
from sqlalchemy.exc import DBAPIError

from .._util import telemetry
from .._util.retrying import Backoff
from .databases import report_lost_connections
from .errors import DatabaseError, ErrorKind, connecting, describe, unusable_url

if TYPE_CHECKING:
    from sqlalchemy import Table
    from sqlalchemy.ext.asyncio import AsyncEngine

    from .migrations import Migrations

_Answer = TypeVar("_Answer")
_Params = ParamSpec("_Params")
_Self = TypeVar("_Self", bound="Database")

SQLITE_BUSY_TIMEOUT_MS = 30_000
#: A transaction is tried so often, and for so long: MySQL alone lets it wait 50 s for a lock.
_ATTEMPTS = 10
_LONGEST_SECONDS = 120.0


def transaction(
    method: Callable[Concatenate[_Self, _Params], Coroutine[Any, Any, _Answer]],
) -> Callable[Concatenate[_Self, _Params], Coroutine[Any, Any, _Answer]]:
    """Make a method of a `Database` one transaction; see `Database.run`."""

    @functools.wraps(method)
    async def run(self: _Self, /, *args: _Params.args, **kwargs: _Params.kwargs) -> _Answer:
        return await self.run(lambda: method(self, *args, **kwargs))

    return run


class Database(BaseSQLDB):
    """An SQL database on SQLite, MySQL, MariaDB or PostgreSQL.

    `async with db:` is one transaction, as in every DiracX database; it cannot be repeated. `db.run(work)` and
    methods that are a `@transaction` can, and are, when the server ends them for reasons of its own.

    Errors that concern the database itself become a `DatabaseError`, those of a row stay SQLAlchemy's.
    """

    migrations: ClassVar[Migrations]
    init_command: ClassVar[str]
    """Command that creates its tables."""
    _turn: asyncio.Lock | None = None

    @property
    def name(self) -> str:
        """Name of the database, as in DIRACX_DB_URL_<NAME>."""
        return self.migrations.database

    @contextlib.asynccontextmanager
    async def engine_context(self) -> AsyncIterator[None]:
        """Open the engine while the context lasts.

        Raises:
            DatabaseError: no engine can be made of the URL.
        """
        async with contextlib.AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(super().engine_context())
            except Exception:
                raise unusable_url(self.name) from None  # the error of a bad URL shows parts of it
            prepare(self.engine)
            if self.engine.dialect.name == "sqlite" and self.engine.url.database in (None, "", ":memory:"):
                # All transactions share its one connection: they must not overlap.
                self._turn = asyncio.Lock()
            yield

    # --- transactions ---------------------------------------------------------------------------------------

    @property
    def in_transaction(self) -> bool:
        """Return whether this context has entered the database (`async with db`)."""
        return self._conn.get() is not None

    async def run(self, work: Callable[[], Awaitable[_Answer]]) -> _Answer:
        """Do work in the caller's transaction where there is one, else in one of its own.

        Its own is repeated as a whole, with `work` called anew, when the server has ended it because of others: a
        deadlock, a lock that was waited for too long, a serialisation failure. Nothing outside the database may
        be done in it.

        Raises:
            DatabaseError: the database cannot be used, or was too busy for all attempts.
        """
        if self.in_transaction:
            return await work()
        pauses, began = Backoff(), time.monotonic()
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                async with self:
                    return await work()
            except DatabaseError as error:
                if error.kind is not ErrorKind.CONFLICT:
                    raise
                telemetry.count_conflict(self.name)
                if attempt == _ATTEMPTS or time.monotonic() - began > _LONGEST_SECONDS:
                    raise
            await asyncio.sleep(pauses.next())
        raise AssertionError("unreachable")

    async def __aenter__(self) -> Self:
        assert self._conn.get() is None, f"{self.name}: a transaction cannot be nested"
        if self._turn is not None:
            await self._turn.acquire()
        try:
            # Not by BaseSQLDB, which logs a traceback.
            with connecting(self.name):
                self._conn.set(await self.engine.connect())
        except BaseException:
            self._end_turn()
            raise
        return self

    async def __aexit__(self, exc_type: Any, exc: Any, tb: Any) -> None:
        # BaseSQLDB keeps its connection when the commit fails, and would never open another.
        connection = self.conn
        lost = False
        try:
            if exc_type is None:
                try:
                    await connection.commit()
                except BaseException as failure:
                    exc = failure
                    if self._turn is None:
                        await connection.invalidate()
                    raise
        except Exception:
            if (told := await self._explained(exc)) is None:
                raise
            raise told from exc
        finally:
            self._conn.set(None)
            lost = connection.invalidated
            try:
                await connection.close()
            finally:
                self._end_turn()
        if (lost or isinstance(exc, DBAPIError)) and (told := await self._explained(exc)) is not None:
            raise told from exc

    def _end_turn(self) -> None:
        if self._turn is not None:
            self._turn.release()

    async def _explained(self, error: BaseException) -> DatabaseError | None:
        told = describe(self.name, error)
        if told is error or told is None or told.kind is not ErrorKind.NOT_READY:
            return None if told is error else told
        with contextlib.suppress(Exception):
            async with self.engine.connect() as connection:
                return await connection.run_sync(not_ready, type(self), self.name) or told
        return told


def not_ready(connection: Connection, database: type[BaseSQLDB], name: str) -> DatabaseError | None:
    """Return the error for missing tables or columns of a database; None: there are none."""
    inspector = inspect(connection)
    # MySQL on some platforms stores names in lower case.
    there = {table.casefold(): table for table in inspector.get_table_names()}
    tables = database.metadata.tables
    missing = [table for table in tables if table.casefold() not in there]
    if len(missing) == len(tables):
        init = getattr(database, "init_command", "python -m diracx.db init-sql")
        state = f"not initialised (no table {', '.join(sorted(missing))}): `{init}`"
    elif lacks := [f"table {table}" for table in missing] or [
        f"column {column.name} in {table.name}"
        for table in tables.values()
        for column in _missing_columns(table, inspector.get_columns(there[table.name.casefold()]))
    ]:
        migrations = getattr(database, "migrations", None)
        remedy = "upgrade its tables" if migrations is None else f"`{migrations.command} upgrade`"
        state = f"of an older version (no {', '.join(sorted(lacks))}): {remedy}"
    else:
        return None
    variable = f"DIRACX_DB_URL_{name.upper()}"
    return DatabaseError(f"the database {name} is {state} with the same {variable}", ErrorKind.NOT_READY)


def _missing_columns(table: Table, there: Iterable[Mapping[str, Any]]) -> list[Any]:
    names = {column["name"].casefold() for column in there}
    return [column for column in table.columns if column.name.casefold() not in names]


# --- connections ------------------------------------------------------------------------------------------------


def prepare(engine: AsyncEngine) -> None:
    """Give each new connection of the engine the same settings, whatever the server's defaults are."""
    prepared = {"sqlite": _prepare_sqlite, "mysql": _prepare_mysql, "mariadb": _prepare_mysql}
    if (prepare_one := prepared.get(engine.dialect.name)) is not None:
        event.listen(engine.sync_engine, "connect", prepare_one)
    if engine.dialect.name in ("mysql", "mariadb"):
        event.listen(engine.sync_engine, "do_connect", _speak_utf8)
    report_lost_connections(engine)


def _speak_utf8(_dialect: Any, _record: Any, _args: Any, parameters: dict[str, Any]) -> None:
    parameters["charset"] = "utf8mb4"


def _prepare_mysql(connection: Any, _record: Any) -> None:
    """Text in UTF-8, refused and not spoiled where it does not fit; reads see what others have committed.

    With REPEATABLE READ, the default, gaps between rows are locked, and a waiter for a row goes on to read what
    was there before its wait. It is not set by the engine's option `isolation_level`, which sets it anew at each
    checkout: when the server has gone meanwhile, that fails at a place where the pool loses its slot.
    """
    cursor = connection.cursor()
    try:
        # A server may ignore what the client has said of itself (--skip-character-set-client-handshake).
        cursor.execute("SET NAMES utf8mb4 COLLATE utf8mb4_bin")
        cursor.execute("SET SESSION sql_mode = CONCAT(@@SESSION.sql_mode, ',STRICT_ALL_TABLES')")
        cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
    finally:
        cursor.close()


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    try:
        cursor.execute(f"PRAGMA busy_timeout={SQLITE_BUSY_TIMEOUT_MS}")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.execute("PRAGMA case_sensitive_like=ON")  # as it is on the other databases
        # Readers and the one writer do not wait for each other. Several processes that open a new file at
        # once may be refused here without waiting; the one that succeeded has switched the file for all.
        with contextlib.suppress(sqlite3.OperationalError):
            cursor.execute("PRAGMA journal_mode=WAL")
    finally:
        cursor.close()
