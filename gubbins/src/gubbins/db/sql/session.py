"""Session of the pilot database: locks, and statements about any number of rows, for each dialect."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVarTuple, cast

from diracx.tasks.plumbing.sql.migrations import Migrations
from diracx.tasks.plumbing.sql.session import Database, transaction
from diracx.tasks.plumbing.sql.types import sanitize
from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Row,
    Select,
    String,
    and_,
    any_,
    bindparam,
    collate,
    func,
    select,
    text,
    true,
    update,
)
from sqlalchemy.sql.selectable import Subquery

from gubbins.domain import clock

from .schema import MAX_REASON_CHARS, ComputeElements, MyPilotDBBase, Pilots

_Columns = TypeVarTuple("_Columns")

LARGE_BATCH_ROWS = 1_000
#: Servers refuse packets of 16 MB by default.
_LARGEST_PAYLOAD_BYTES = 4 << 20
_READERS = {
    # LIMIT -1 keeps SQLite from merging this into the statement around it, where it would read the whole list
    # again for each pilot.
    "sqlite": (
        "SELECT json_extract(value, '$[0]') AS id, json_extract(value, '$[1]') AS reason "
        "FROM json_each(:staged) LIMIT -1"
    ),
    "postgresql": (
        "SELECT CAST(value ->> 0 AS BIGINT) AS id, value ->> 1 AS reason "
        "FROM json_array_elements(CAST(:staged AS JSON)) AS pair(value)"
    ),
    # Else its text is in the character set of the database.
    "mysql": (
        "SELECT pair.id, pair.reason FROM JSON_TABLE(:staged, '$[*]' COLUMNS (id BIGINT PATH '$[0]', "
        "reason TEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin PATH '$[1]')) AS pair"
    ),
}
_READERS["mariadb"] = _READERS["mysql"]


class PilotSession(Database):
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
        """Lock the rows of these compute elements (None: of all) until the transaction ends; return their number.

        Every transaction that locks pilots or compute elements begins with this: it locks in the order of the
        names, so that no two wait for each other. (MySQL locks the compute element of each pilot whose
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
        """Make a derived table `id, reason` of these rows, for a statement of the present transaction."""
        if self.conn.dialect.name == "postgresql" and len(rows) > LARGE_BATCH_ROWS:
            # With no statistics yet (a burst of new pilots) it would read the whole list for each pilot.
            await self.conn.execute(text("SET LOCAL enable_nestloop = off"))
        return _staged_rows(self.conn.dialect.name, rows)

    def _are(self, these: Subquery, id: Any = Pilots.id) -> ColumnElement[bool]:
        """Condition that a pilot is one of these rows, in a form that the server answers from an index."""
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


def portions(rows: Iterable[tuple[int, str | None]]) -> Iterator[list[tuple[int, str | None]]]:
    """Split rows into lists that fit a packet: all in one, unless 100,000 of them have long reasons."""
    portion: list[tuple[int, str | None]] = []
    size = 0
    for row in rows:
        reason = row[1]
        # In ASCII a character takes 12 bytes at most, and drivers escape each backslash.
        bytes_ = 24 + (0 if reason is None else len(reason) * (2 if reason.isascii() else 14))
        if portion and size + bytes_ > _LARGEST_PAYLOAD_BYTES:
            yield portion
            portion, size = [], 0
        portion.append(row)
        size += bytes_
    if portion:
        yield portion


def _staged_rows(dialect: str, rows: Iterable[tuple[int, str | None]]) -> Subquery:
    """Make a derived table `id, reason` of these rows, to join with; a row without a reason has NULL.

    One bound parameter for any number of rows: a list of 100,000 ids is too long for bound parameters (SQLite
    takes 32,766, PostgreSQL 65,535), and a statement per chunk is not a constant number of statements (P62). All
    three databases read JSON, each with a function of its own.

    Args:
        dialect: SQLAlchemy's name of it.
        rows: pairs of id and reason.
    """
    payload = json.dumps(
        [(id,) if reason is None else (id, sanitize(reason, MAX_REASON_CHARS)) for id, reason in rows]
    )
    statement = text(_READERS[dialect]).bindparams(bindparam("staged", payload, String))
    return statement.columns(id=BigInteger, reason=String).subquery("staged_rows")
