"""Sessions with an SQL database: transactions that are repeated after conflicts, connections, errors."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, ParamSpec, Self, TypeVar

from diracx.db.sql.utils import BaseSQLDB
from sqlalchemy import Connection, event
from sqlalchemy.exc import DBAPIError

from .._util import telemetry
from .._util.retrying import Backoff
from .clock import DatabaseClock
from .databases import watch_connections
from .errors import DatabaseError, ErrorKind, connecting, describe, unusable_url
from .migrations import Migrations, Tables, described

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine


_Result = TypeVar("_Result")
_Params = ParamSpec("_Params")
_Self = TypeVar("_Self", bound="Database")

SQLITE_BUSY_TIMEOUT_MS = 30_000
#: Maximum time for all attempts of a transaction; MySQL lets each wait 50 s for a lock.
_LONGEST_SECONDS = 120.0


def transaction(
    method: Callable[Concatenate[_Self, _Params], Coroutine[Any, Any, _Result]],
) -> Callable[Concatenate[_Self, _Params], Coroutine[Any, Any, _Result]]:
    """Run a method of a `Database` in a transaction; see `Database.run`."""

    @functools.wraps(method)
    async def run(self: _Self, /, *args: _Params.args, **kwargs: _Params.kwargs) -> _Result:
        return await self.run(lambda: method(self, *args, **kwargs))

    return run


class Database(BaseSQLDB):
    """An SQL database on SQLite, MySQL, MariaDB or PostgreSQL.

    `async with db:` is one transaction, as in every DiracX database, and is not repeated. `db.run(work)` and
    methods with `@transaction` are repeated after a conflict with other transactions.

    Errors of the database are converted to a `DatabaseError`, those of a row are SQLAlchemy's.
    """

    migrations: ClassVar[Migrations]
    init_command: ClassVar[str]
    """Command that creates its tables."""
    max_attempts = 10
    """Maximum number of attempts of a transaction."""
    _single_connection: asyncio.Lock | None = None

    def __init__(self, db_url: str) -> None:
        super().__init__(db_url)
        self.clock = DatabaseClock()

    @property
    def name(self) -> str:
        """Name of the database, as in DIRACX_DB_URL_<NAME>."""
        return self.migrations.database

    @contextlib.asynccontextmanager
    async def engine_context(self) -> AsyncIterator[None]:
        """Open the engine while the context lasts.

        Raises:
            DatabaseError: the URL is invalid.
        """
        async with contextlib.AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(super().engine_context())
            except Exception as error:
                raise unusable_url(self.name, error) from None  # the error may have parts of the URL
            prepare(self.engine)
            self.clock.synchronize(self.engine)
            if self.engine.dialect.name == "sqlite" and self.engine.url.database in (None, "", ":memory:"):
                # Its transactions share one connection, and must not overlap.
                self._single_connection = asyncio.Lock()
            yield

    # --- transactions ---------------------------------------------------------------------------------------

    @property
    def in_transaction(self) -> bool:
        """Return whether this context has entered the database (`async with db`)."""
        return self._conn.get() is not None

    async def run(self, work: Callable[[], Awaitable[_Result]]) -> _Result:
        """Call `work` in the transaction of the caller, else in a new one.

        A new transaction is repeated, with another call of `work`, after a deadlock, a timeout of a lock, or a
        serialisation failure. `work` must not have side effects outside the database.

        Raises:
            DatabaseError: the database is unavailable, or all attempts failed with a conflict.
        """
        if self.in_transaction:
            return await work()
        backoff, began = Backoff(), time.monotonic()
        for attempt in range(1, self.max_attempts + 1):
            try:
                async with self:
                    return await work()
            except DatabaseError as error:
                if error.kind is not ErrorKind.CONFLICT:
                    raise
                telemetry.count_conflict(self.name)
                if attempt == self.max_attempts or time.monotonic() - began > _LONGEST_SECONDS:
                    raise
            await asyncio.sleep(backoff.next())
        raise AssertionError("unreachable")

    async def __aenter__(self) -> Self:
        assert self._conn.get() is None, f"{self.name}: a transaction cannot be nested"
        if self._single_connection is not None:
            await self._single_connection.acquire()
        try:
            # Not `super().__aenter__`, which logs a traceback.
            with connecting(self.name):
                self._conn.set(await self.engine.connect())
        except BaseException:
            self._release_connection()
            raise
        return self

    async def __aexit__(self, exc_type: Any, exc: Any, tb: Any) -> None:
        # Not `super().__aexit__`, which keeps the connection if the commit fails.
        connection = self.conn
        lost = False
        try:
            if exc_type is None:
                try:
                    await connection.commit()
                except BaseException as failure:
                    exc = failure
                    if self._single_connection is None:
                        await connection.invalidate()
                    raise
        except Exception:
            if (described := await self._describe(exc)) is None:
                raise
            raise described from exc
        finally:
            self._conn.set(None)
            lost = connection.invalidated
            try:
                await connection.close()
            finally:
                self._release_connection()
        if (lost or isinstance(exc, DBAPIError)) and (described := await self._describe(exc)) is not None:
            raise described from exc

    def _release_connection(self) -> None:
        if self._single_connection is not None:
            self._single_connection.release()

    async def _describe(self, error: BaseException) -> DatabaseError | None:
        described = describe(self.name, error)
        if described is error or described is None or described.kind is not ErrorKind.NOT_READY:
            return None if described is error else described
        with contextlib.suppress(Exception):
            async with self.engine.connect() as connection:
                return await connection.run_sync(not_ready, type(self), self.name) or described
        return described


def not_ready(connection: Connection, database: type[BaseSQLDB], name: str) -> DatabaseError | None:
    """Return the error for missing tables or columns of a database, if any."""
    tables, models = Tables(connection), database.metadata
    if tables.none_of(models.tables):
        init = getattr(database, "init_command", "python -m diracx.db init-sql")
        state = f"not initialised (no table {', '.join(sorted(models.tables))}): `{init}`"
    elif lacks := tables.lacking(models, indexes=False):
        migrations = getattr(database, "migrations", None)
        remedy = "upgrade its tables" if migrations is None else f"`{migrations.command} upgrade`"
        state = f"of an older version (no {', '.join(sorted(map(described, lacks)))}): {remedy}"
    else:
        return None
    variable = f"DIRACX_DB_URL_{name.upper()}"
    return DatabaseError(f"the database {name} is {state} with the same {variable}", ErrorKind.NOT_READY)


# --- connections ------------------------------------------------------------------------------------------------


def prepare(engine: AsyncEngine) -> None:
    """Configure each new connection of the engine, independently of the defaults of the server."""
    prepared = {"sqlite": _prepare_sqlite, "mysql": _prepare_mysql, "mariadb": _prepare_mysql}
    if (prepare_one := prepared.get(engine.dialect.name)) is not None:
        event.listen(engine.sync_engine, "connect", prepare_one)
    if engine.dialect.name in ("mysql", "mariadb"):
        event.listen(engine.sync_engine, "do_connect", _set_charset)
    watch_connections(engine)


def _set_charset(_dialect: Any, _record: Any, _args: Any, parameters: dict[str, Any]) -> None:
    parameters["charset"] = "utf8mb4"


def _prepare_mysql(connection: Any, _record: Any) -> None:
    """Set UTF-8, strict mode (text that is too long is refused, not truncated) and READ COMMITTED.

    REPEATABLE READ, the default, locks gaps between rows, and reads stale rows after a lock wait. The option
    `isolation_level` of the engine is set at each checkout, where the pool loses a slot if the server is down.
    """
    cursor = connection.cursor()
    try:
        # The server may ignore the charset of the connection (--skip-character-set-client-handshake).
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
        cursor.execute("PRAGMA case_sensitive_like=ON")  # as on the other databases
        # With WAL, readers and the writer do not block each other. If several processes open a new file at the
        # same time, one of them sets it for all.
        with contextlib.suppress(sqlite3.OperationalError):
            cursor.execute("PRAGMA journal_mode=WAL")
    finally:
        cursor.close()
