"""Programs that the published package 0.7.0 runs."""

from __future__ import annotations

__all__ = ["CREATE"]

#: Creates the tables of its dead letters.
CREATE = """
import asyncio, os
from diracx.tasks.plumbing.persistence import TaskDB
async def create():
    db = TaskDB(os.environ["DIRACX_DB_URL_TASKDB"])
    async with db.engine_context(), db.engine.begin() as connection:
        await connection.run_sync(db.metadata.create_all)
asyncio.run(create())
"""
