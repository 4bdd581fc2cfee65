"""How `MyPilotDB` talks to its server: locks, and statements about any number of rows, per dialect."""

from __future__ import annotations

__all__ = ["PilotDBConnection"]

import contextlib
from collections.abc import AsyncIterator, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVarTuple, cast

from diracx.tasks.plumbing.sql.migrations import Migrations
from diracx.tasks.plumbing.sql.session import Database, transaction
from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Row,
    Select,
    and_,
    any_,
    collate,
    func,
    select,
    text,
    true,
    update,
)
from sqlalchemy.sql.selectable import Subquery

from gubbins.domain import clock

from .schema import ComputeElements, MyPilotDBBase, Pilots
from .staging import staged

_Columns = TypeVarTuple("_Columns")

LARGE_BATCH_ROWS = 1_000


class PilotDBConnection(Database):
    """Transactions of the pilot database.

    Every write that decides something starts with a statement that takes a lock (an UPDATE), so that nothing
    it has read can be stale: on SQLite this takes the write lock before the first read of the transaction,
    on MySQL and PostgreSQL the row lock.
    """

    metadata = MyPilotDBBase.metadata
    init_command = "gubbins db init"
    migrations = Migrations("MyPilotDB", metadata, Path(__file__).parent / "migrations", "gubbins db")

    @contextlib.asynccontextmanager
    async def engine_context(self) -> AsyncIterator[None]:
        """The engine, for as long as the context lasts."""
        async with super().engine_context():
            clock.follow(self.engine)
            yield

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

    @transaction
    async def _rows(self, statement: Select[*_Columns]) -> Sequence[Row[*_Columns]]:
        """Rows to write about, read before the transaction that does: on SQLite, one that begins by reading may be
        refused the right to write."""
        return (await self.conn.execute(statement)).all()

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

    async def create_tables(self) -> bool:
        """Create the tables in a database that has none; True when it had none.

        Raises:
            MigrationError: it is of an older version.
            DatabaseError: it cannot be used.
        """
        return await self.migrations.create(self.engine)
