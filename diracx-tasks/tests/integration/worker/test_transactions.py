"""Transactions of tasks: commit, rollback, and order relative to locks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest
from diracx.db.sql.utils import BaseSQLDB
from diracx.tasks.plumbing import BaseTask, MutexLock
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.plumbing.injection.providers import sql_overrides
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.plumbing.sql.databases import watch_connections
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from sqlalchemy import Column, ForeignKey, Integer, MetaData, Table, event, func, insert, make_url, select, text
from support.network import Network
from support.waiting import until

metadata = MetaData()
# The references are checked at the commit, so that a commit can fail.
rows = Table(
    "rows",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("parent", ForeignKey("rows.id", deferrable=True, initially="DEFERRED")),
)


_WITHOUT_DEFERRING = (
    "CREATE TABLE `rows` (id INT PRIMARY KEY, parent INT, FOREIGN KEY (parent) REFERENCES `rows` (id))"
)


class RowsDB(BaseSQLDB):
    """One table."""

    metadata = metadata


class Locked(BaseTask):
    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(JOB, "rows")]


@dataclass
class Insert(Locked):
    id: int
    parent: int | None = None
    fails: bool = False

    async def execute(self, db: RowsDB) -> int:
        """Insert a row and return how many there were."""
        before = (await db.conn.execute(select(func.count()).select_from(rows))).scalar_one()
        await db.conn.execute(insert(rows).values(id=self.id, parent=self.parent))
        if self.fails:
            raise ValueError("after the insert")
        return int(before)


class Ask(BaseTask):
    async def execute(self, db: RowsDB) -> None:
        await db.conn.execute(text("SELECT 1"))


@pytest.fixture(params=["sqlite", "mariadb", "postgresql"])
async def db(
    request: pytest.FixtureRequest, empty_database: Callable[[str], Awaitable[str]]
) -> AsyncIterator[RowsDB]:
    database = RowsDB(await empty_database(request.param))
    async with database.engine_context():
        if request.param == "sqlite":
            event.listen(
                database.engine.sync_engine,
                "connect",
                lambda connection, _: connection.execute("PRAGMA foreign_keys=ON"),
            )
        async with database.engine.begin() as connection:
            if request.param == "mariadb":  # checks references at once, and knows no other way
                await connection.execute(text(_WITHOUT_DEFERRING))
            else:
                await connection.run_sync(metadata.create_all)
        yield database


async def count(db: RowsDB) -> int:
    async with db:
        return int((await db.conn.execute(select(func.count()).select_from(rows))).scalar_one())


async def test_P27_the_next_lock_holder_sees_the_committed_data(redis_url: str, db: RowsDB) -> None:
    def commits_slowly(_connection: Any) -> None:
        import time

        time.sleep(0.05)  # a commit over a network: another worker has time to take a lock that was given back

    event.listen(db.engine.sync_engine, "commit", commits_slowly)
    async with TaskSystem([Insert], redis_url=redis_url, overrides=sql_overrides(db)) as system:
        ids = [await Insert(number).schedule() for number in range(6)]
        results = [await system.result(task_id, timeout=20) for task_id in ids]
    assert sorted(result.return_value for result in results) == [0, 1, 2, 3, 4, 5]


async def test_P35_a_failed_task_leaves_nothing_in_the_database(redis_url: str, db: RowsDB) -> None:
    async with TaskSystem([Insert], redis_url=redis_url, overrides=sql_overrides(db)) as system:
        failed = await system.result(await Insert(1, fails=True).schedule())
        assert failed.is_err
        assert await count(db) == 0
        assert (await system.result(await Insert(1).schedule())).return_value == 0


async def test_P35_a_failed_commit_is_a_failed_task(redis_url: str, db: RowsDB) -> None:
    async with TaskSystem([Insert], redis_url=redis_url, overrides=sql_overrides(db)) as system:
        failed = await system.result(await Insert(1, parent=99).schedule())
        assert failed.error is not None
        assert "FOREIGN KEY" in failed.error["message"].upper()  # MariaDB knows it at the insert
        assert await count(db) == 0
        assert not (await system.result(await Insert(2).schedule())).is_err


async def test_P36_a_task_that_waits_for_a_lock_has_opened_no_connection(
    redis_url: str, redis: Redis, db: RowsDB
) -> None:
    checked_out = 0

    def note(*_: Any) -> None:
        nonlocal checked_out
        checked_out += 1

    event.listen(db.engine.sync_engine.pool, "checkout", note)
    held = MutexLock(JOB, "rows")
    assert await held.acquire(redis)
    async with TaskSystem([Insert], redis_url=redis_url, overrides=sql_overrides(db)) as system:
        task_id = await Insert(1).schedule()
        await until(lambda: redis.exists(keys.DELAYED))
        assert checked_out == 0
        await held.release(redis)
        assert not (await system.result(task_id)).is_err
    assert checked_out == 1


@pytest.mark.event_loops("asyncio", "uvloop")
@pytest.mark.parametrize("kind", ["mariadb", "postgresql"])
async def test_a_connection_that_was_lost_between_two_tasks_fails_neither(
    kind: str, redis_url: str, empty_database: Callable[[str], Awaitable[str]]
) -> None:
    url = make_url(await empty_database(kind))
    network = Network(f"redis://{url.host}:{url.port}")
    network.start()
    db = RowsDB(url.set(host="127.0.0.1", port=urlsplit(network.url).port).render_as_string(hide_password=False))
    async with db.engine_context(), TaskSystem([Ask], redis_url=redis_url, overrides=sql_overrides(db)) as system:
        watch_connections(db.engine)
        for _ in range(2):
            done = await system.result(await Ask().schedule())
            assert done.error is None, done.error
            network.cut()
            await asyncio.sleep(1.1)  # unused
    network.stop()
