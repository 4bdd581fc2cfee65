"""A database of books, for injection."""

from contextlib import AsyncExitStack
from typing import Any

from diracx.db.sql.utils import BaseSQLDB
from diracx.tasks.plumbing.injection.plan import (
    compile_plan,
    resolve,
)
from sqlalchemy import Column, ForeignKey, Integer, MetaData, Table, func, insert, select

metadata = MetaData()


shelves = Table("shelves", metadata, Column("id", Integer, primary_key=True))


# Checked at the commit and not before: the only honest way to make a commit fail.
books = Table(
    "books",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("shelf", ForeignKey("shelves.id", deferrable=True, initially="DEFERRED")),
)


class LibraryDB(BaseSQLDB):
    metadata = metadata

    async def add_shelf(self, number: int) -> None:
        await self.conn.execute(insert(shelves).values(id=number))

    async def add_book_on_missing_shelf(self) -> None:
        await self.conn.execute(insert(books).values(id=1, shelf=404))

    async def count(self) -> int:
        return (await self.conn.execute(select(func.count()).select_from(shelves))).scalar_one()


async def run(execute: Any, overrides: dict[Any, Any]) -> Any:
    """Run the steps of a worker: resolve, execute, unwind."""
    plan = compile_plan(execute)
    async with AsyncExitStack() as stack:
        return await execute(**await resolve(plan, overrides, stack))
