"""Promises of the revisions of any database class. A module of tests subclasses `SchemaPromises`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, ClassVar

import pytest
from diracx.tasks.plumbing.sql.migrations import MigrationError, Migrations
from sqlalchemy import Connection, Engine, MetaData, Table, event, inspect, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

KINDS = ("sqlite", "mariadb", "postgresql")


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[AsyncConnection]:
    engine = create_async_engine(url)
    try:
        async with engine.begin() as connection:
            yield connection
    finally:
        await engine.dispose()


async def on(url: str, work: Callable[[Connection], Any]) -> Any:
    async with connected(url) as connection:
        return await connection.run_sync(work)


def shape(connection: Connection, leave_out: str) -> dict[str, Any]:
    """All that the server reports about its tables, except the order of columns."""
    inspector = inspect(connection)

    def sorted_by_text(found: Any) -> list[str]:
        return sorted(str(sorted(each.items(), key=str)) for each in found)

    return {
        name: {
            "columns": sorted_by_text(
                {**column, "type": column["type"].compile(connection.dialect)}
                for column in inspector.get_columns(name)
            ),
            "primary key": inspector.get_pk_constraint(name)["constrained_columns"],
            "foreign keys": sorted_by_text(inspector.get_foreign_keys(name)),
            "indexes": sorted_by_text(inspector.get_indexes(name)),
            "unique": sorted_by_text(inspector.get_unique_constraints(name)),
            "checks": sorted_by_text(inspector.get_check_constraints(name)),
            "options": str(inspector.get_table_options(name).get("mysql_collate")),
        }
        for name in inspector.get_table_names()
        if name.casefold() != leave_out.casefold()
    }


def rows(connection: Connection) -> dict[str, list[dict[str, Any]]]:
    """All rows of all tables, as the server has them."""
    found = {}
    for name in inspect(connection).get_table_names():
        table = Table(name, MetaData(), autoload_with=connection)
        ordered = select(table).order_by(*table.primary_key.columns)
        found[name] = [dict(row._mapping) for row in connection.execute(ordered)]
    return found


class Interrupted(BaseException):
    """The end of a process."""


@contextmanager
def interrupted_after(creations: int) -> Iterator[None]:
    """Context that ends before a further table or index is created."""
    left = creations

    def interrupt(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        nonlocal left
        left -= statement.lstrip().startswith("CREATE")
        if left < 0:
            raise Interrupted

    event.listen(Engine, "before_cursor_execute", interrupt)
    try:
        yield
    finally:
        event.remove(Engine, "before_cursor_execute", interrupt)


class SchemaPromises:
    """`migrations` and `fill` are the subclass's."""

    migrations: ClassVar[Migrations]

    async def fill(self, url: str) -> None:
        """Put rows into every table of a database at the newest revision."""
        raise NotImplementedError

    @pytest.fixture(params=KINDS)
    async def url(self, request: pytest.FixtureRequest, empty_database: Callable[[str], Awaitable[str]]) -> str:
        if request.param != "sqlite":
            request.getfixturevalue(f"{request.param}_server")
        return await empty_database(request.param)

    def order(self) -> list[str]:
        return [script.revision for script in self.migrations._scripts().walk_revisions()][::-1]

    async def create(self, url: str) -> bool:
        engine = create_async_engine(url)
        try:
            return await self.migrations.create(engine)
        finally:
            await engine.dispose()

    async def create_all(self, url: str) -> None:
        await on(url, self.migrations.metadata.create_all)

    async def test_revisions_and_models_make_the_same_database(
        self, url: str, empty_database: Callable[[str], Awaitable[str]]
    ) -> None:
        await self.migrations.upgrade(url)
        assert await on(url, self.migrations.differences) == []
        kind = next(kind for kind in KINDS if kind[:5] in url.replace("mysql", "mariadb"))
        other = await empty_database(kind)
        await self.create_all(other)
        by_revisions, by_models = [
            await on(each, lambda connection: shape(connection, self.migrations.version_table))
            for each in (url, other)
        ]
        assert by_revisions == by_models

    async def test_every_revision_down_and_up_again_keeps_the_rows(self, url: str) -> None:
        await self.migrations.upgrade(url)
        await self.fill(url)
        full = await on(url, rows)
        full.pop(self.migrations.version_table)
        assert all(full.values()), "every table needs rows for this"
        down = self.order()[-2::-1]
        for revision in (*down, *self.order()[1:]):
            move = self.migrations.downgrade if revision in down else self.migrations.upgrade
            down = [each for each in down if each != revision]
            assert (await move(url, revision)).after == revision
            now = await on(url, rows)
            assert now.pop(self.migrations.version_table) == [{"version_num": revision}]
            for name in full.keys() - now.keys():
                full[name] = []  # a table that went comes back empty
            for name, there in now.items():
                assert len(there) == len(full[name])
                for row, before in zip(there, full[name], strict=True):
                    assert {column: before[column] for column in row.keys() & before.keys()} == {
                        column: row[column] for column in row.keys() & before.keys()
                    }
                    for column in before.keys() - row.keys():
                        del before[column]  # so does a column
        assert await on(url, self.migrations.differences) == []

    async def test_the_first_revision_down_leaves_no_table_and_the_way_up_is_open(self, url: str) -> None:
        await self.migrations.upgrade(url)
        await self.fill(url)
        assert (await self.migrations.downgrade(url, "base")).after is None
        assert set(await on(url, rows)) == {self.migrations.version_table}
        await self.migrations.upgrade(url)
        await self.fill(url)

    async def test_tables_made_by_create_all_have_the_newest_revision(self, url: str) -> None:
        await self.create_all(url)
        await self.fill(url)
        before = await on(url, rows)
        move = await self.migrations.upgrade(url)
        assert (move.recognised, move.before, move.after) == (True, self.order()[-1], self.order()[-1])
        after = await on(url, rows)
        after.pop(self.migrations.version_table)
        assert before == after

    async def test_several_upgrades_at_once_are_one_upgrade(self, url: str) -> None:
        moves = await asyncio.gather(*(self.migrations.upgrade(url) for _ in range(4)))
        assert sorted(len(move.steps) for move in moves) == [0, 0, 0, len(self.order())]
        await self.fill(url)

    async def test_several_creations_at_once_are_one_creation(self, url: str) -> None:
        created = await asyncio.gather(*(self.create(url) for _ in range(4)), self.migrations.upgrade(url))
        assert sum(each is True or bool(getattr(each, "steps", ())) for each in created) == 1
        assert await on(url, self.migrations.differences) == []

    @pytest.mark.parametrize("command", ["create", "upgrade"])
    async def test_an_interrupted_creation_can_be_repeated(self, url: str, command: str) -> None:
        """Each attempt creates one table or index more; on MariaDB, what it has created stays."""
        attempt = self.create if command == "create" else self.migrations.upgrade
        attempts, creations = 0, 1
        done = False
        while not done:
            with suppress(Interrupted), interrupted_after(creations):
                await attempt(url)
                done = True
            attempts += 1
            if "mysql" not in url:
                assert done or await on(url, rows) == {}
                creations *= 2
            assert attempts < 100
        assert attempts > 2
        state = await self.migrations.current(url)
        assert (state.revision, state.stamped) == (state.head, True)
        assert await on(url, self.migrations.differences) == []
        await self.fill(url)

    async def test_missing_tables_are_created_again(self, url: str) -> None:
        await self.migrations.upgrade(url)
        await on(url, self.migrations.metadata.drop_all)
        assert await self.create(url)
        assert not await self.create(url)
        assert await on(url, self.migrations.differences) == []

    async def test_tables_of_other_software_do_not_change(self, url: str) -> None:
        name = next(iter(self.migrations.metadata.tables))
        async with connected(url) as connection:
            quoted = connection.dialect.identifier_preparer.quote(name)
            await connection.execute(text(f"CREATE TABLE {quoted} (x INTEGER PRIMARY KEY)"))
        for attempt in (self.migrations.upgrade, self.migrations.current, self.create):
            with pytest.raises(MigrationError, match="not those of this software"):
                await attempt(url)
        assert await on(url, rows) == {name: []}

    async def test_a_database_of_a_newer_version_does_not_change(self, url: str) -> None:
        await self.migrations.upgrade(url)
        async with connected(url) as connection:
            version = connection.dialect.identifier_preparer.quote(self.migrations.version_table)
            await connection.execute(text(f"UPDATE {version} SET version_num = '9999'"))
        with pytest.raises(MigrationError, match="revision 9999, which is unknown to this version of the"):
            await self.migrations.upgrade(url)
