"""Fixtures: a database of dead letters on each kind of server, and a broker."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from diracx.tasks.plumbing.persistence import TaskDB
from support.databases import with_tables
from support.dead_letters import KINDS


@pytest.fixture(params=KINDS)
def db_kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def db_url(db_kind: str, empty_database: Callable[[str], Awaitable[str]]) -> str:
    return await empty_database(db_kind)


@pytest.fixture
async def db(db_url: str) -> AsyncIterator[TaskDB]:
    database = TaskDB(db_url)
    async with with_tables(database):
        yield database
