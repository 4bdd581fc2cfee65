"""Session of the pilot database: row locks, and statements with any number of rows, per SQL dialect."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
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
#: The default packet limit of servers is 16 MB.
_MAX_PAYLOAD_BYTES = 4 << 20
_READERS = {
    # LIMIT -1 prevents SQLite from flattening this subquery, which would read the whole list for each pilot.
    "sqlite": (
        "SELECT json_extract(value, '$[0]') AS id, json_extract(value, '$[1]') AS reason "
        "FROM json_each(:staged) LIMIT -1"
    ),
    "postgresql": (
        "SELECT CAST(value ->> 0 AS BIGINT) AS id, value ->> 1 AS reason "
        "FROM json_array_elements(CAST(:staged AS JSON)) AS pair(value)"
    ),
    # Without the character set, text would have that of the database.
    "mysql": (
        "SELECT pair.id, pair.reason FROM JSON_TABLE(:staged, '$[*]' COLUMNS (id BIGINT PATH '$[0]', "
        "reason TEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin PATH '$[1]')) AS pair"
    ),
}
_READERS["mariadb"] = _READERS["mysql"]


class PilotSession(Database):
    """Transactions of the pilot database.

    A transaction that writes according to what it reads begins with an UPDATE that takes a lock, so that no read
    is stale: the write lock on SQLite, row locks on MySQL and PostgreSQL.
    """

    metadata = MyPilotDBBase.metadata
    init_command = "gubbins db init"
    migrations = Migrations("MyPilotDB", metadata, Path(__file__).parent / "migrations", "gubbins db")

    def __init__(self, db_url: str) -> None:
        super().__init__(db_url)
        self.clock = clock.database

    async def lock_ces(self, names: Collection[str] | None = None) -> int:
        """Lock the rows of compute elements (None: all) until the transaction ends; return their number.

        Each transaction that locks pilots or compute elements begins with this. To prevent deadlocks, rows are
        locked in the order of their names. (MySQL locks the compute element of each changed pilot, for the foreign
        key.) It is an UPDATE without changes, for SQLite has no SELECT … FOR UPDATE.
        """
        where = true() if names is None else ComputeElements.name.in_(names)
        if self.conn.dialect.name == "postgresql" and (names is None or len(names) > 1):
            # Its UPDATE locks rows in no defined order.
            await self.conn.execute(
                select(ComputeElements.name)
                .where(where)
                .order_by(collate(ComputeElements.name, "C"))
                .with_for_update(key_share=True)
            )
        locked = await self.conn.execute(
            update(ComputeElements).where(where).values(capacity=ComputeElements.capacity)
        )
        return int(locked.rowcount)

    async def _update_ce(self, name: str, *where: ColumnElement[bool], **values: Any) -> bool:
        """Update columns of a compute element that matches the conditions; False: there is none."""
        statement = update(ComputeElements).where(ComputeElements.name == name, *where).values(**values)
        return bool((await self.conn.execute(statement)).rowcount)

    @transaction
    async def _rows(self, statement: Select[*_Columns]) -> Sequence[Row[*_Columns]]:
        """Read rows before the transaction that changes them: SQLite may refuse to upgrade a read transaction."""
        return (await self.conn.execute(statement)).all()

    async def _staged(self, rows: Sequence[tuple[int, str | None]]) -> Subquery:
        """Make a derived table `id, reason` of the rows, for a statement of the current transaction."""
        if self.conn.dialect.name == "postgresql" and len(rows) > LARGE_BATCH_ROWS:
            # Without statistics (after a burst of new pilots) it would read the whole list for each pilot.
            await self.conn.execute(text("SET LOCAL enable_nestloop = off"))
        return _staged_rows(self.conn.dialect.name, rows)

    def _is_staged(self, staged: Subquery, id: Any = Pilots.id) -> ColumnElement[bool]:
        """Condition that a pilot is one of the staged rows, in a form that uses an index."""
        if self.conn.dialect.name == "postgresql":
            # With nested loops off, only `= ANY` uses the index.
            ids = func.array(select(staged.c.id).scalar_subquery(), type_=ARRAY(BigInteger))
            return and_(id == staged.c.id, id == any_(ids))
        return cast(ColumnElement[bool], id == staged.c.id)

    async def create_tables(self) -> bool:
        """Create the tables in an empty database; False: they exist.

        Raises:
            MigrationError: the tables are of an older version.
            DatabaseError: the database cannot be used.
        """
        return await self.migrations.create(self.engine)


def split_batches(rows: Iterable[tuple[int, str | None]]) -> Iterator[list[tuple[int, str | None]]]:
    """Split rows into lists that fit a packet; 100,000 rows with short reasons fit one."""
    batch: list[tuple[int, str | None]] = []
    size = 0
    for row in rows:
        reason = row[1]
        # A character takes at most 12 bytes as JSON escapes, whose backslashes drivers escape again.
        bytes_ = 24 + (0 if reason is None else len(reason) * (2 if reason.isascii() else 14))
        if batch and size + bytes_ > _MAX_PAYLOAD_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += bytes_
    if batch:
        yield batch


def _staged_rows(dialect: str, rows: Iterable[tuple[int, str | None]]) -> Subquery:
    """Make a derived table `id, reason` of the rows, from one bound parameter: a JSON array.

    Lists of ids are limited to 32,766 bound parameters by SQLite and 65,535 by PostgreSQL, and one statement per
    chunk would not be a constant number of statements.
    """
    payload = json.dumps(
        [(id,) if reason is None else (id, sanitize(reason, MAX_REASON_CHARS)) for id, reason in rows]
    )
    statement = text(_READERS[dialect]).bindparams(bindparam("staged", payload, String))
    return statement.columns(id=BigInteger, reason=String).subquery("staged_rows")
