"""Databases of the tests: SQLite files always, PostgreSQL and MariaDB where they are installed.

And a compute element that does what a test says.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from importlib import metadata
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any, ClassVar

import pytest
from diracx.db.sql import PilotAgentsDB
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import create_async_engine
from support.databases import with_tables
from support.moving_clock import Clock

from gubbins.ces import CEBackend, Observation, PilotAtCE, SubmitOutcome
from gubbins.ces import registry as back_ends
from gubbins.ces.protocol import CESettings
from gubbins.db.sql import MyPilotDB
from gubbins.domain import clock
from gubbins.domain.pilot_states import MyPilotStatus


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite+aiosqlite:///{tmp_path}/pilots.db"


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def db_server(request: pytest.FixtureRequest) -> str:
    """Each kind of server, started."""
    kind = str(request.param)
    if kind != "sqlite":
        request.getfixturevalue(f"{kind}_server")
    return kind


@pytest.fixture
async def db_url(db_server: str, empty_database: Callable[[str], Awaitable[str]]) -> str:
    """The URL of an empty database on each kind of server."""
    return await empty_database(db_server)


@pytest.fixture(scope="session")
def tables_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Awaitable[str]]:
    """`await tables_of(kind, path, create)`: the URL of a database with tables and nothing in them.

    On a server it is always the same one, emptied; on SQLite a copy, in a file at `path`. `create` makes it first.
    """
    made: dict[str, str] = {}

    async def url_of(kind: str, path: Path, create: Callable[[str], Awaitable[str]]) -> str:
        if kind not in made:
            directory = tmp_path_factory.mktemp("tables")
            made[kind] = f"sqlite+aiosqlite:///{directory}/pilots.db" if kind == "sqlite" else await create(kind)
            database = MyPilotDB(made[kind])
            async with database.engine_context():
                await database.create_tables()
        elif kind != "sqlite":
            await _empty(made[kind])
        if kind != "sqlite":
            return made[kind]
        shutil.copy(made[kind].partition("///")[2], path)
        return f"sqlite+aiosqlite:///{path}"

    return url_of


async def _empty(url: str) -> None:
    """Empty all tables but the one that names the version, and let numbers begin with 1."""
    names = [table.name for table in MyPilotDB.metadata.sorted_tables]
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        if url.startswith("postgresql"):
            listed = ", ".join(f'"{name}"' for name in names)
            await connection.exec_driver_sql(f"TRUNCATE {listed} RESTART IDENTITY")
        else:
            await connection.exec_driver_sql("SET FOREIGN_KEY_CHECKS=0")
            for name in await connection.scalars(text(_used(names))):
                await connection.exec_driver_sql(f"TRUNCATE TABLE `{name}`")
    await engine.dispose()


def _used(names: list[str]) -> str:
    """Ask MariaDB which tables have rows, or had some with numbers: it makes the files of a truncated one anew."""
    filled = " UNION ".join(f"SELECT '{name}' FROM (SELECT 1 FROM `{name}` LIMIT 1) AS one" for name in names)
    return f"""{filled} UNION SELECT table_name FROM information_schema.tables
        WHERE table_schema = DATABASE() AND auto_increment > 1"""


@pytest.fixture
async def tables_url(
    db_server: str, tmp_path: Path, empty_database: Callable[[str], Awaitable[str]], tables_of: Any
) -> str:
    """The URL of the database of `db`."""
    return str(await tables_of(db_server, tmp_path / "pilots.db", empty_database))


@pytest.fixture
async def db(tables_url: str) -> AsyncIterator[MyPilotDB]:
    """A pilot database with its tables, not in a transaction."""
    database = MyPilotDB(tables_url)
    async with database.engine_context():
        yield database


@pytest.fixture
async def registry(
    db_server: str, empty_database: Callable[[str], Awaitable[str]]
) -> AsyncIterator[PilotAgentsDB]:
    """DiracX's own pilot registry with its tables, beside each kind of server; it does not know PostgreSQL."""
    kind = "sqlite" if db_server == "postgresql" else db_server
    async with _registry_at(await empty_database(kind)) as made:
        yield made


@pytest.fixture
async def sqlite_registry(tmp_path: Path) -> AsyncIterator[PilotAgentsDB]:
    """The same, on SQLite only."""
    async with _registry_at(f"sqlite+aiosqlite:///{tmp_path}/registry.db") as made:
        yield made


@pytest.fixture
def registry_at() -> Callable[[str], contextlib.AbstractAsyncContextManager[PilotAgentsDB]]:
    """Makes one with its tables in the empty database of a URL."""
    return _registry_at


@contextlib.asynccontextmanager
async def _registry_at(url: str) -> AsyncIterator[PilotAgentsDB]:
    registry = PilotAgentsDB(url)
    async with with_tables(registry):
        yield registry


@pytest.fixture
async def sqlite_db(sqlite_url: str, tmp_path: Path, tables_of: Any) -> AsyncIterator[MyPilotDB]:
    """The same, on SQLite only: for tests in which the kind of server makes no difference."""
    database = MyPilotDB(await tables_of("sqlite", tmp_path / "pilots.db", None))
    async with database.engine_context():
        yield database


@pytest.fixture
def count_statements() -> Callable[[MyPilotDB], contextlib.AbstractContextManager[list[str]]]:
    """`with count_statements(db) as statements:` collects what is sent to the server."""

    @contextlib.contextmanager
    def counting(database: MyPilotDB) -> Iterator[list[str]]:
        statements: list[str] = []

        def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
            statements.append(statement)

        engine = database.engine.sync_engine
        event.listen(engine, "before_cursor_execute", note)
        try:
            yield statements
        finally:
            event.remove(engine, "before_cursor_execute", note)

    return counting


@pytest.fixture(scope="session")
def test_sandbox_settings() -> Any:
    """In place of the one of `diracx.testing`, which starts a simulated S3: the client factory wants to have
    settings for every service, and the pilot system has no sandboxes."""
    from diracx.core.settings import SandboxStoreSettings

    return SandboxStoreSettings(bucket_name="none", s3_client_kwargs={}, auto_create_bucket=False)


class ScriptedBackend(CEBackend[CESettings]):
    """Returns what the test wrote down, by CE name: an exception is raised, an event is waited for.

    What is not written down is unknown to it.
    """

    Settings = CESettings
    submissions: ClassVar[dict[str, Any]] = {}
    observations: ClassVar[dict[str, Any]] = {}
    cancellations: ClassVar[dict[str, Any]] = {}
    cancelled: ClassVar[list[str]] = []
    calls: ClassVar[list[tuple[str, str]]] = []  # (CE, what), in their order
    forgotten: ClassVar[dict[str, MyPilotStatus]] = {}

    async def submit(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome]:
        response = await self._play("submit", self.submissions[self.ce.name])
        return {pilot.stamp: response for pilot in pilots}

    async def poll(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, Observation]:
        response = await self._play("poll", self.observations.get(self.ce.name))
        return {} if response is None else {pilot.stamp: response for pilot in pilots}

    async def cancel(self, pilots: Sequence[PilotAtCE]) -> None:
        await self._play("cancel", self.cancellations.get(self.ce.name))
        self.cancelled.extend(pilot.stamp for pilot in pilots)

    async def cleanup(self, pilots: Sequence[PilotAtCE]) -> None:
        self.forgotten.update((pilot.stamp, pilot.status) for pilot in pilots)

    async def _play(self, what: str, response: Any) -> Any:
        self.calls.append((self.ce.name, what))
        if isinstance(response, asyncio.Event):
            await response.wait()
            return None
        if isinstance(response, Exception):
            raise response
        return response


#: What is installed stays the same, and reading it takes 6 ms.
_installed_entry_points = functools.cache(metadata.entry_points)


@pytest.fixture
def install_backend(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, type[CEBackend[Any]]], None]:
    """`install_backend("name", Class)`: as if a package had brought it, for one test."""

    def install(name: str, backend: type[CEBackend[Any]]) -> None:
        installed = back_ends.entry_points
        if installed is metadata.entry_points:
            installed = _installed_entry_points

        class Ours(EntryPoint):
            def load(self) -> Any:
                return backend

        def entry_points(**params: Any) -> EntryPoints:
            return EntryPoints([*installed(group=params["group"]), Ours(name, "x:y", params["group"])]).select(
                **params
            )

        monkeypatch.setattr(back_ends, "entry_points", entry_points)

    return install


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, install_backend: Any) -> type[ScriptedBackend]:
    """The back end `scripted`, installed for one test."""
    for name in ("submissions", "observations", "cancellations", "forgotten"):
        monkeypatch.setattr(ScriptedBackend, name, {})
    monkeypatch.setattr(ScriptedBackend, "warning", None)
    for name in ("cancelled", "calls"):
        monkeypatch.setattr(ScriptedBackend, name, [])
    install_backend("scripted", ScriptedBackend)
    return ScriptedBackend


@pytest.fixture
def time() -> Iterator[Clock]:
    """The clock of the pilots, moved by the test alone."""
    moving = Clock()
    with clock.simulated(moving):
        yield moving
