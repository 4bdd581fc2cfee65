"""Schema migrations of an SQL database with Alembic: read its revision, upgrade, downgrade.

A database class has its revisions in a directory of its package (`env.py`, `versions/`) and its own version table,
so that several databases can share a schema. A database without a version table, as made by `python -m diracx.db
init-sql`, is at the newest revision if it has all tables, columns and indexes of the models.
"""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.script import Script, ScriptDirectory
    from sqlalchemy import Column, Connection, Index, MetaData, Table
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    Part = Table | Column[Any] | Index

BASE = "base"
HEAD = "head"
_LOCK_SECONDS = 60
_CONNECT_SECONDS = 10
#: Dialects in which a change of the schema commits the transaction.
_WITHOUT_TRANSACTIONS = ("mysql", "mariadb")


class MigrationError(Exception):
    """A migration is not possible; the message has reason and remedy in one line."""


@dataclass(frozen=True)
class Step:
    """Revision of a schema."""

    revision: str
    what: str
    """First line of its docstring."""


@dataclass(frozen=True)
class State:
    """Current revision of a database."""

    revision: str | None
    """None: it has no tables, or its creation was interrupted."""
    head: str
    """The newest revision, which the software needs."""
    pending: tuple[Step, ...]
    """Steps of an upgrade, oldest first."""
    stamped: bool
    """True if the revision is from the version table; else it was detected from the tables."""


@dataclass(frozen=True)
class Move:
    """Result of an upgrade or a downgrade."""

    before: str | None
    after: str | None
    steps: tuple[Step, ...]
    """Applied steps, in order."""
    recognised: bool
    """True if the database had no version table, and its revision was detected from its tables."""


@dataclass(frozen=True)
class Migrations:
    """Migrations of a database class."""

    database: str
    """Name, as in DIRACX_DB_URL_<NAME>."""
    metadata: MetaData
    directory: Path
    command: str
    """Command for operators, for error messages, as `gubbins db`."""

    @property
    def version_table(self) -> str:
        """Name of the version table."""
        return f"{self.database}Version"

    # --- public methods -------------------------------------------------------------------------------------

    async def current(self, url: str) -> State:
        """Return the revision of a database. Changes nothing.

        Raises:
            MigrationError: its tables do not match any revision, or it is newer than the software.
            DatabaseError: it is unavailable.
        """
        async with _connection(url, self.database) as connection:
            return await connection.run_sync(self._state)

    async def upgrade(self, url: str, to: str = HEAD) -> Move:
        """Upgrade a database to a newer revision: create missing tables, stamp a database without a version.

        Completes a creation that was interrupted.

        Args:
            url: URL of the database.
            to: a revision, or `head`.

        Raises:
            MigrationError: as for `current`; the revision does not exist, or is older.
        """
        return await self._move(url, to, forward=True)

    async def downgrade(self, url: str, to: str) -> Move:
        """Downgrade a database to an older revision, or to `base`, which has no tables. Drops newer columns.

        Raises:
            MigrationError: as for `current`; the revision does not exist, or is newer.
        """
        return await self._move(url, to, forward=False)

    async def create(self, engine: AsyncEngine) -> bool:
        """Create the tables of the newest revision, or those that are missing. Returns False if all exist.

        Raises:
            MigrationError: there are tables of an older revision, or other ones.
            DatabaseError: it is unavailable.
        """
        from .errors import explained

        with explained(self.database):
            async with engine.connect() as connection, exclusive(connection, self.version_table):
                return await connection.run_sync(self._create)

    # --- on a connection ------------------------------------------------------------------------------------

    def _create(self, connection: Connection) -> bool:
        _check_encoding(connection)
        missing = bool(Tables(connection).lacking(self.metadata, indexes=True))
        if not _installed():
            self.metadata.create_all(connection)
            return missing
        state = self._state(connection)
        if state.revision is not None and state.pending:
            raise MigrationError(
                f"the database {self.database} is at revision {state.revision}, and {state.head} is needed: "
                f"`{self.command} upgrade`"
            )
        self._run(connection, HEAD, forward=True)
        return missing

    def _complete(self, connection: Connection) -> None:
        """Create missing tables and indexes, unless columns are missing, too."""
        lacking = Tables(connection).lacking(self.metadata, indexes=True)
        if not columns_of(lacking):
            for each in lacking:
                each.create(connection)

    def _state(self, connection: Connection) -> State:
        scripts = self._scripts()
        stamped = self._stamped(connection, scripts)
        revision = stamped if stamped is not None else self._recognised(connection, scripts)
        head = _only_head(scripts)
        pending = reversed(list(scripts.iterate_revisions(head, revision or BASE)))
        return State(revision, head, tuple(map(_step, pending)), stamped is not None)

    def _stamped(self, connection: Connection, scripts: ScriptDirectory) -> str | None:
        from alembic.runtime.migration import MigrationContext

        context = MigrationContext.configure(connection, opts={"version_table": self.version_table})
        revision = context.get_current_revision()
        if revision is not None and revision not in {script.revision for script in scripts.walk_revisions()}:
            raise MigrationError(
                f"the database {self.database} is at revision {revision}, which is unknown to this version of the "
                f"software (its newest is {_only_head(scripts)}): install the version that made it"
            )
        return revision

    def _recognised(self, connection: Connection, scripts: ScriptDirectory) -> str | None:
        """Return the newest revision if all tables, columns and indexes of the models exist.

        None: there are no tables, or on MySQL those of an interrupted creation, which has made the version table.
        """
        tables = Tables(connection)
        if tables.none_of(self.metadata.tables):
            return None
        lacking = tables.lacking(self.metadata, indexes=True)
        if wrong := lacking if tables.none_of([self.version_table]) else columns_of(lacking):
            raise MigrationError(
                f"the tables of the database {self.database} are not those of this software: "
                f"{described(wrong[0])} is missing; rename them first"
            )
        return None if lacking else _only_head(scripts)

    async def _move(self, url: str, to: str, *, forward: bool) -> Move:
        async with _connection(url, self.database) as connection, exclusive(connection, self.version_table):
            return await connection.run_sync(lambda sync: self._run(sync, to, forward))

    def _run(self, connection: Connection, to: str, forward: bool) -> Move:
        _check_encoding(connection)
        scripts = self._scripts()
        from alembic import command

        order = [script.revision for script in _from_oldest(scripts)]
        target = order[-1] if to == HEAD else to
        before = self._state(connection)
        begun = before.revision is None and not Tables(connection).none_of(self.metadata.tables)
        if forward and target == order[-1] and (begun or before.revision == target):
            self._complete(connection)
            before = self._state(connection)
        if target not in (*order, BASE):
            raise MigrationError(
                f"{self.database} has no revision {to!r}; the revisions are {BASE}, {', '.join(order)} and {HEAD}"
            )
        start = 0 if before.revision is None else order.index(before.revision) + 1
        end = 0 if target == BASE else order.index(target) + 1
        if (end - start) * (1 if forward else -1) < 0:
            other = "downgrade" if forward else "upgrade"
            raise MigrationError(
                f"the database {self.database} is at {before.revision or BASE}; "
                f"for {target}, run `{self.command} {other} {target}`"
            )
        recognised = before.revision is not None and not before.stamped
        if recognised:
            self._stamp(connection, str(before.revision))
        if start != end:
            if connection.dialect.name in _WITHOUT_TRANSACTIONS:
                connection.commit()  # Alembic then commits after each revision
            (command.upgrade if forward else command.downgrade)(self._config(connection), target)
            _check_foreign_keys(connection)
        steps = [_step(script) for script in _from_oldest(scripts)][min(start, end) : max(start, end)]
        after = None if target == BASE else target
        return Move(before.revision, after, tuple(steps if forward else reversed(steps)), recognised)

    # --- Alembic --------------------------------------------------------------------------------------------

    def _stamp(self, connection: Connection, revision: str) -> None:
        from alembic import command

        command.stamp(self._config(connection), revision)

    def _scripts(self) -> ScriptDirectory:
        config = self._config()
        from alembic.script import ScriptDirectory

        return ScriptDirectory.from_config(config)

    def _config(self, connection: Connection | None = None) -> Config:
        if not _installed():
            raise MigrationError(
                f"the revisions of {self.database} need Alembic: pip install 'diracx-tasks[migrations]'"
            )
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(self.directory).replace("%", "%%"))
        config.attributes.update(connection=connection, migrations=self)
        return config

    def differences(self, connection: Connection) -> list[Any]:
        """Return the differences between the database and the models, for tests and new revisions."""
        from alembic.autogenerate import compare_metadata
        from alembic.runtime.migration import MigrationContext

        context = MigrationContext.configure(connection, opts=self._options())
        return list(compare_metadata(context, self.metadata))

    def _options(self) -> dict[str, Any]:
        tables = {name.casefold() for name in self.metadata.tables}

        def include_name(name: str | None, kind: str, _parents: Any) -> bool:
            return kind != "table" or (name or "").casefold() in tables

        return {
            "version_table": self.version_table,
            "include_name": include_name,
            "target_metadata": self.metadata,
            "compare_type": True,
            # SQLite needs a copy of a table to change it.
            "render_as_batch": True,
            "transaction_per_migration": True,
        }


def run_env() -> None:
    """Run the revisions; called by `env.py`."""
    from alembic import context

    migrations: Migrations = context.config.attributes["migrations"]
    context.configure(connection=context.config.attributes["connection"], **migrations._options())
    with context.begin_transaction():
        context.run_migrations()


def _installed() -> bool:
    from importlib.util import find_spec

    return find_spec("alembic") is not None


def _from_oldest(scripts: ScriptDirectory) -> list[Script]:
    return list(scripts.walk_revisions())[::-1]


def _only_head(scripts: ScriptDirectory) -> str:
    return str(scripts.get_current_head())


def _step(script: Script) -> Step:
    return Step(script.revision, script.doc.splitlines()[0].rstrip("."))


class Tables:
    """Tables of a database, by case-insensitive name: some MySQL servers store names in lower case."""

    def __init__(self, connection: Connection) -> None:
        from sqlalchemy import inspect

        self._inspector = inspect(connection)
        self._names = {name.casefold(): name for name in self._inspector.get_table_names()}

    def none_of(self, tables: Iterable[str]) -> bool:
        return not any(name.casefold() in self._names for name in tables)

    def lacking(self, metadata: MetaData, *, indexes: bool) -> list[Part]:
        """Return missing tables, columns and, optionally, indexes of the models."""
        found: list[Part] = []
        for table in metadata.sorted_tables:
            name = self._names.get(table.name.casefold())
            if name is None:
                found.append(table)
                continue
            existing = {column["name"].casefold() for column in self._inspector.get_columns(name)}
            found += [each for each in table.columns if each.name.casefold() not in existing]
            if indexes:
                existing = {(index["name"] or "").casefold() for index in self._inspector.get_indexes(name)}
                found += [each for each in table.indexes if str(each.name).casefold() not in existing]
        return found


def columns_of(parts: Iterable[Part]) -> list[Part]:
    return [part for part in parts if part.__visit_name__ == "column"]


def described(part: Part) -> str:
    """Describe a part of the tables, as `column Name in Jobs`."""
    table = getattr(part, "table", None)
    return f"{part.__visit_name__} {part.name}" + ("" if table is None else f" in {table.name}")


# --- connections ------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _connection(url: str, database: str) -> AsyncIterator[AsyncConnection]:
    """Open a connection; on SQLite without foreign keys, as replacing a table would delete rows of others."""
    from sqlalchemy.ext.asyncio import create_async_engine
    from sqlalchemy.pool import NullPool

    from .errors import connecting, explained, unusable_url

    try:
        engine = create_async_engine(url, poolclass=NullPool)
    except Exception as error:
        raise unusable_url(database, error) from None  # the error may have parts of the URL
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(explained(database))
        stack.push_async_callback(engine.dispose)
        with connecting(database):
            async with asyncio.timeout(_CONNECT_SECONDS):
                connection = await stack.enter_async_context(engine.connect())
        yield connection


@contextlib.asynccontextmanager
async def exclusive(connection: AsyncConnection, name: str) -> AsyncIterator[None]:
    """Exclude concurrent migrations of this database; except on MySQL, all is one transaction."""
    dialect = connection.dialect.name
    if dialect in _WITHOUT_TRANSACTIONS:
        # The lock is per server: its name includes the schema.
        lock = f"CONCAT(LEFT(DATABASE(), 40), '.{name}')"
        taken = await connection.exec_driver_sql(f"SELECT GET_LOCK({lock}, {_LOCK_SECONDS})")
        if taken.scalar_one() != 1:
            raise MigrationError(f"another process has been migrating this database for {_LOCK_SECONDS} s")
        await connection.commit()
        try:
            yield
            await connection.commit()
        finally:
            with contextlib.suppress(Exception):  # the end of a connection releases the lock, too
                await connection.exec_driver_sql(f"DO RELEASE_LOCK({lock})")
        return
    if dialect == "sqlite":
        await connection.exec_driver_sql(f"PRAGMA busy_timeout={_LOCK_SECONDS * 1000}")
        await connection.exec_driver_sql("BEGIN IMMEDIATE")
    elif dialect == "postgresql":
        await connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({zlib.crc32(name.encode())})")
    yield
    await connection.commit()


def _check_encoding(connection: Connection) -> None:
    """Check the encoding on PostgreSQL, where it is a property of the database."""
    if connection.dialect.name == "postgresql":
        encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
        if encoding != "UTF8":
            raise MigrationError(
                f"the encoding of this PostgreSQL database is {encoding}, which cannot store all characters: "
                "CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0, and use that one"
            )


def _check_foreign_keys(connection: Connection) -> None:
    if connection.dialect.name == "sqlite":
        broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
        if broken:
            raise MigrationError(f"rows would refer to rows that do not exist: {broken[:3]}; nothing was changed")
