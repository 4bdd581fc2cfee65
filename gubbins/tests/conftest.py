"""Databases of the tests: SQLite files always, PostgreSQL and MariaDB where they are installed."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from gubbins.db.sql import MyPilotDB


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


@pytest.fixture
async def db(db_url: str) -> AsyncIterator[MyPilotDB]:
    """A pilot database with its tables, not in a transaction."""
    database = MyPilotDB(db_url)
    async with database.engine_context():
        await database.create_tables()
        yield database


@pytest.fixture
async def sqlite_db(sqlite_url: str) -> AsyncIterator[MyPilotDB]:
    """The same, on SQLite only: for tests in which the kind of server makes no difference."""
    database = MyPilotDB(sqlite_url)
    async with database.engine_context():
        await database.create_tables()
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
