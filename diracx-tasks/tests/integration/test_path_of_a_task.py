"""Number of files of the project that one task passes, from `schedule()` to its settlement."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import diracx.tasks.plumbing
import pytest
from diracx.db.sql.utils import BaseSQLDB
from diracx.tasks.plumbing import BaseTask, MutexLock
from diracx.tasks.plumbing.injection.providers import sql_overrides
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from sqlalchemy import MetaData, text
from support.waiting import until

PLUMBING = str(Path(diracx.tasks.plumbing.__file__).parent)
STREAM = "diracx:tasks:normal:medium"
#: Nothing but the task happens while it is traced.
QUIET = {"result_ttl_seconds": None, "housekeeping_seconds": 600.0, "lease_seconds": 600.0}


class EmptyDB(BaseSQLDB):
    metadata = MetaData()


@dataclass
class NoOp(BaseTask):
    number: int

    async def execute(self) -> None: ...


@dataclass
class LockedWithDatabase(NoOp):
    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(JOB, "one")]

    async def execute(self, db: EmptyDB) -> None:  # type: ignore[override]
        await db.conn.execute(text("SELECT 1"))


class FilesPassed:
    """Notes the files whose functions are called in this thread."""

    def __init__(self) -> None:
        self.files: set[str] = set()

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PLUMBING):
            self.files.add(frame.f_code.co_filename.removeprefix(PLUMBING + "/"))


async def settled(redis: Redis) -> None:
    await until(lambda: redis.xlen(STREAM), when=lambda found: not found)
    await asyncio.sleep(0.05)  # until the reply is read, and what was noted of the task is forgotten


async def files_passed(redis: Redis, task: BaseTask) -> set[str]:
    """Return the shortest path of several runs: reports and renewals may add files."""
    paths = []
    for _ in range(3):
        path = FilesPassed()
        sys.setprofile(path)
        try:
            await task.schedule()
            await settled(redis)
        finally:
            sys.setprofile(None)
        paths.append(path.files)
    return min(paths, key=len)


@pytest.mark.parametrize(("task", "most"), [(NoOp(1), 15), (LockedWithDatabase(1), 24)])
async def test_a_task_passes_few_files(
    redis_url: str,
    redis: Redis,
    empty_database: Callable[[str], Awaitable[str]],
    task: BaseTask,
    most: int,
) -> None:
    database = EmptyDB(await empty_database("sqlite"))
    async with (
        database.engine_context(),
        TaskSystem(
            [NoOp, LockedWithDatabase],
            redis_url=redis_url,
            workers=1,
            scheduler=False,
            overrides=sql_overrides(database),
            settings=QUIET,
        ),
    ):
        await task.schedule()  # what is worked out once
        await settled(redis)
        files = await files_passed(redis, task)
    print(f"{type(task).__name__} passes {len(files)} files: {' '.join(sorted(files))}")
    assert len(files) <= most
