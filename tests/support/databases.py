"""Databases with their tables, as `python -m diracx.db init-sql` makes them."""

from __future__ import annotations

__all__ = ["with_tables"]

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

from diracx.db.sql.utils import BaseSQLDB

_Database = TypeVar("_Database", bound=BaseSQLDB)


@asynccontextmanager
async def with_tables(database: _Database) -> AsyncIterator[_Database]:
    """Open a database and create its tables; it is closed after the block."""
    async with database.engine_context():
        async with database.engine.begin() as connection:
            await connection.run_sync(database.metadata.create_all)
        yield database
