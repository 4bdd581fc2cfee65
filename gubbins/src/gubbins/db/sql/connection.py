"""How `MyPilotDB` talks to its server: locking behaviour per dialect, and units of work."""

from __future__ import annotations

__all__ = ["DatabaseNotReadyError", "PilotDBConnection"]

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Collection, Sequence
from pathlib import Path
from typing import Any, Literal, Self, cast

from diracx.db.sql.utils import BaseSQLDB, SQLDBUnavailableError
from diracx.tasks.plumbing.databases import read_committed, report_lost_connections
from diracx.tasks.plumbing.migrations import Migrations
from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Connection,
    and_,
    any_,
    collate,
    event,
    func,
    inspect,
    select,
    text,
    true,
    update,
)
from sqlalchemy.exc import DBAPIError, OperationalError, ProgrammingError
from sqlalchemy.sql.selectable import Subquery

from gubbins import clock

from .schema import ComputeElements, MyPilotDBBase, Pilots
from .staging import staged

SQLITE_BUSY_TIMEOUT_MS = 30_000
LARGE_BATCH_ROWS = 1_000


class DatabaseNotReadyError(SQLDBUnavailableError):
    """The database answers, and lacks tables or columns of the pilot system."""

    def __init__(self, *, behind: bool = False) -> None:
        super().__init__(
            "MyPilotDB is of an older version: `gubbins db upgrade` takes it to the present one"
            if behind
            else "MyPilotDB is not initialised: `gubbins db init` creates its tables"
        )


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    try:
        cursor.execute(f"PRAGMA busy_timeout={SQLITE_BUSY_TIMEOUT_MS}")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.execute("PRAGMA synchronous=NORMAL")
        # Readers and the one writer do not wait for each other. Several processes that open a new file at
        # once may be refused here without waiting; the one that succeeded has switched the file for all.
        with contextlib.suppress(sqlite3.OperationalError):
            cursor.execute("PRAGMA journal_mode=WAL")
    finally:
        cursor.close()


class PilotDBConnection(BaseSQLDB):
    """Transactions of the pilot database.

    Every write that decides something starts with a statement that takes a lock (an UPDATE), so that nothing
    it has read can be stale: on SQLite this takes the write lock before the first read of the transaction,
    on MySQL and PostgreSQL the row lock.
    """

    metadata = MyPilotDBBase.metadata
    migrations = Migrations("MyPilotDB", metadata, Path(__file__).parent / "migrations", "gubbins db")
    _turn: asyncio.Lock | None = None

    @contextlib.asynccontextmanager
    async def engine_context(self) -> AsyncIterator[None]:
        async with super().engine_context():
            engine = self.engine
            if engine.dialect.name == "sqlite":
                event.listen(engine.sync_engine, "connect", _prepare_sqlite)
            # Else, on MySQL, a waiter of the row lock would count the pilots of before its wait, and two compute
            # elements deadlock on the gaps between their rows.
            read_committed(engine)
            clock.follow(engine)
            report_lost_connections(engine)
            if engine.dialect.name == "sqlite" and engine.url.database in (None, "", ":memory:"):
                # All transactions share its one connection: they must not overlap.
                self._turn = asyncio.Lock()
            yield

    async def __aenter__(self) -> Self:
        if self._turn is not None:
            await self._turn.acquire()
        try:
            return await super().__aenter__()
        except BaseException:
            self._end_turn()
            raise

    async def __aexit__(self, *error: Any) -> None:
        try:
            await super().__aexit__(*error)  # type: ignore[no-untyped-call]  # of diracx-db
        finally:
            self._end_turn()

    def _end_turn(self) -> None:
        if self._turn is not None:
            self._turn.release()

    @property
    def in_transaction(self) -> bool:
        """Whether this context has entered the database (`async with db`)."""
        return self._conn.get() is not None

    @contextlib.asynccontextmanager
    async def unit(self) -> AsyncIterator[None]:
        """A unit of work: the caller's transaction where there is one, else a short one of its own.

        Raises:
            DatabaseNotReadyError: the tables do not exist.
            SQLDBUnavailableError: the server cannot be reached.
        """
        async with contextlib.AsyncExitStack() as stack:
            if not self.in_transaction:
                await stack.enter_async_context(self._transaction())
            try:
                yield
            except DBAPIError as error:
                if error.connection_invalidated:
                    raise SQLDBUnavailableError(f"MyPilotDB went away: {error.orig}") from error
                if isinstance(error, OperationalError | ProgrammingError) and (
                    lacking := await self._what_is_missing()
                ):
                    raise DatabaseNotReadyError(behind=lacking == "columns") from error
                raise

    @contextlib.asynccontextmanager
    async def _transaction(self) -> AsyncIterator[None]:
        await self.__aenter__()
        connection = self.conn
        try:
            yield
            # Here and not in __aexit__, which forgets to close the connection of a failed commit.
            await connection.commit()
        finally:
            self._conn.set(None)
            try:
                await connection.close()
            finally:
                self._end_turn()

    async def lock_ces(self, names: Collection[str] | None = None) -> int:
        """Hold the rows of these compute elements (None: of all) until the transaction ends; how many there are.

        Whoever locks pilots or compute elements at some of them begins with this: it locks in the order of
        the names, so that no two wait for each other. (MySQL locks the compute element of each pilot whose
        state changes, for its foreign key.) An UPDATE that changes nothing, because SQLite has no SELECT …
        FOR UPDATE.
        """
        those = true() if names is None else ComputeElements.name.in_(names)
        if self.conn.dialect.name == "postgresql" and (names is None or len(names) > 1):
            # It would update the rows as they lie.
            await self.conn.execute(
                select(ComputeElements.name)
                .where(those)
                .order_by(collate(ComputeElements.name, "C"))
                .with_for_update(key_share=True)
            )
        locked = await self.conn.execute(
            update(ComputeElements).where(those).values(capacity=ComputeElements.capacity)
        )
        return int(locked.rowcount)

    async def _staged(self, rows: Sequence[tuple[int, str | None]]) -> Subquery:
        """These rows as a derived table `id, reason`, for a statement of the present transaction."""
        if self.conn.dialect.name == "postgresql" and len(rows) > LARGE_BATCH_ROWS:
            # With no statistics yet (a burst of new pilots) it would read the whole list for each pilot.
            await self.conn.execute(text("SET LOCAL enable_nestloop = off"))
        return staged(self.conn.dialect.name, rows)

    def _are(self, these: Subquery, id: Any = Pilots.id) -> ColumnElement[bool]:
        """That a pilot is one of these rows, in words by which the server finds it without reading all pilots."""
        if self.conn.dialect.name == "postgresql":
            # Without nested loops it could look up each only so.
            ids = func.array(select(these.c.id).scalar_subquery(), type_=ARRAY(BigInteger))
            return and_(id == these.c.id, id == any_(ids))
        return cast(ColumnElement[bool], id == these.c.id)

    async def _what_is_missing(self) -> Literal["tables", "columns"] | None:
        try:
            async with self.engine.connect() as connection:
                return await connection.run_sync(self._lacking)
        except DBAPIError:
            return None

    def _lacking(self, connection: Connection) -> Literal["tables", "columns"] | None:
        inspector = inspect(connection)
        # MySQL on some platforms stores names in lower case.
        present = {name.lower(): name for name in inspector.get_table_names()}
        wanted = {name.lower(): table for name, table in self.metadata.tables.items()}
        if not present.keys() & wanted.keys():
            return "tables"
        for name, table in wanted.items():
            if name not in present:
                return "columns" if self.migrations.version_table.lower() in present else "tables"
            there = {column["name"].lower() for column in inspector.get_columns(present[name])}
            if not {column.name.lower() for column in table.columns} <= there:
                return "columns"
        return None

    async def create_tables(self) -> bool:
        """Create the tables in a database that has none; True when it had none.

        Raises:
            MigrationError: it is of an older version.
            SQLDBUnavailableError: it cannot be reached, or refuses.
        """
        try:
            return await self.migrations.create(self.engine)
        except OSError as error:
            raise SQLDBUnavailableError(f"cannot reach MyPilotDB: {error}") from error
        except DBAPIError as error:
            raise SQLDBUnavailableError(f"cannot create the tables of MyPilotDB: {error.orig}") from error
