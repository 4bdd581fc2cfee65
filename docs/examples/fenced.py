"""A row with a fencing token, which refuses a writer that has lost its lock."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated

from diracx.tasks.plumbing import BaseLock, BaseTask, MutexLock, held_locks, register_locked_object_type
from fastapi import Depends
from sqlalchemy import BigInteger, Column, MetaData, String, Table, update
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

REPORT = register_locked_object_type("report")
metadata = MetaData()
reports = Table(
    "reports",
    metadata,
    Column("name", String(50), primary_key=True),
    Column("text", String(200)),
    Column("token", BigInteger, nullable=False, default=0),  # of the last writer
)


async def write(connection: AsyncConnection, name: str, text: str, token: int) -> bool:
    """Write the report in one statement, unless the holder of a later grant has written it."""
    newest = (reports.c.name == name) & (reports.c.token <= token)
    written = await connection.execute(update(reports).where(newest).values(text=text, token=token))
    return written.rowcount == 1


@asynccontextmanager
async def database() -> AsyncIterator[AsyncConnection]:
    engine = create_async_engine("sqlite+aiosqlite:///reports.db")
    async with engine.begin() as connection:
        yield connection
    await engine.dispose()


@dataclass
class Publish(BaseTask):
    name: str

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(REPORT, self.name)]

    async def execute(self, connection: Annotated[AsyncConnection, Depends(database)]) -> bool:
        [lock] = held_locks()
        assert lock.token is not None
        return await write(connection, self.name, "all is well", lock.token)
