"""Transactions aborted by the database are repeated as a whole."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from diracx.tasks.plumbing._util import telemetry
from diracx.tasks.plumbing.persistence import DeadLetter, TaskDB
from diracx.tasks.plumbing.persistence.schema import DeadLetters
from diracx.tasks.plumbing.sql.errors import DatabaseError, ErrorKind
from sqlalchemy import select, text, update
from support.waiting import until

SERVERS = ["mariadb", "postgresql"]


@pytest.fixture
def conflicts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The databases whose transactions were run again, as the metric counts them."""
    counted: list[str] = []
    monkeypatch.setattr(telemetry, "count_conflict", counted.append)
    return counted


@pytest.fixture
async def task_db(request: pytest.FixtureRequest, empty_database: Any) -> AsyncIterator[TaskDB]:
    """A database of the kind of the test's parameter, with two dead letters."""
    database = TaskDB(await empty_database(request.param))
    async with database.engine_context():
        await database.migrations.create(database.engine)
        for name in ("one", "two"):
            await database.insert(DeadLetter(task_id=name, task_name="t:T", reason="x", detail="", data=b""))
        yield database


def beside(work: Awaitable[Any]) -> asyncio.Task[Any]:
    """Run in a context of its own, outside the transaction of the caller."""
    return asyncio.create_task(work, context=contextvars.Context())  # type: ignore[arg-type]  # a coroutine


async def note(db: TaskDB, task_id: str, word: str) -> None:
    change = update(DeadLetters).where(DeadLetters.task_id == task_id)
    await db.conn.execute(change.values(detail=DeadLetters.detail + word))


async def details(db: TaskDB) -> list[str]:
    return ["".join(sorted(dead_letter["detail"])) for dead_letter in await db.search(status=None)]


@pytest.mark.parametrize("task_db", SERVERS, indirect=True)
async def test_both_sides_of_a_deadlock_come_to_their_end(task_db: TaskDB, conflicts: list[str]) -> None:
    locked = {"a": asyncio.Event(), "b": asyncio.Event()}

    def crossing(me: str, other: str, first: str, second: str) -> Callable[[], Awaitable[None]]:
        async def work() -> None:
            await note(task_db, first, me)
            locked[me].set()
            await locked[other].wait()
            await note(task_db, second, me)

        return work

    sides = [("a", "b", "one", "two"), ("b", "a", "two", "one")]
    async with asyncio.timeout(60):
        await asyncio.gather(*(beside(task_db.run(crossing(*side))) for side in sides))
    assert conflicts == ["TaskDB"]
    assert await details(task_db) == ["ab", "ab"]


@pytest.mark.parametrize("task_db", ["postgresql"], indirect=True)
async def test_a_decision_from_a_stale_read_is_repeated(task_db: TaskDB, conflicts: list[str]) -> None:
    read: list[str] = []

    async def work() -> None:
        await task_db.conn.execute(text("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"))
        detail = select(DeadLetters.detail).where(DeadLetters.task_id == "one")
        read.append((await task_db.conn.execute(detail)).scalar_one())
        if len(read) == 1:
            await beside(task_db.run(lambda: note(task_db, "one", "b")))
        await note(task_db, "one", "a")

    await task_db.run(work)
    assert read == ["", "b"]
    assert await details(task_db) == ["ab", ""]
    assert conflicts == ["TaskDB"]


@pytest.mark.parametrize("task_db", ["sqlite", *SERVERS], indirect=True)
async def test_a_transaction_that_waited_too_long_for_a_row_lock_is_retried(
    task_db: TaskDB, conflicts: list[str]
) -> None:
    lock_timeouts = {
        "sqlite": "PRAGMA busy_timeout=1",
        "mysql": "SET SESSION innodb_lock_wait_timeout=1",
        "postgresql": "SET LOCAL lock_timeout=1",
    }
    held, tries = asyncio.Event(), 0

    async def holder() -> None:
        await note(task_db, "one", "b")
        held.set()
        await until(lambda: tries >= 2)

    async def work() -> None:
        nonlocal tries
        tries += 1
        await task_db.conn.execute(text(lock_timeouts[task_db.conn.dialect.name]))
        await note(task_db, "one", "a")

    holding = beside(task_db.run(holder))
    await held.wait()
    async with asyncio.timeout(60):
        await task_db.run(work)
        await holding
    assert await details(task_db) == ["ab", ""]
    assert conflicts


@pytest.mark.parametrize("task_db", ["sqlite"], indirect=True)
async def test_a_transaction_that_fails_repeatedly_is_an_error_of_one_line(
    task_db: TaskDB, conflicts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_db, "max_attempts", 3)
    async with task_db:
        await note(task_db, "one", "b")

        async def work() -> None:
            await task_db.conn.execute(text("PRAGMA busy_timeout=1"))
            await note(task_db, "one", "a")

        with pytest.raises(DatabaseError, match="TaskDB is busy") as caught:
            await beside(task_db.run(work))
        assert caught.value.kind is ErrorKind.CONFLICT
    assert conflicts == ["TaskDB"] * 3
    assert await details(task_db) == ["b", ""]


@pytest.mark.parametrize("task_db", ["sqlite"], indirect=True)
async def test_errors_of_the_work_are_not_retried(task_db: TaskDB, conflicts: list[str]) -> None:
    tries = 0

    async def work() -> None:
        nonlocal tries
        tries += 1
        await note(task_db, "one", "a")
        raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own"):
        await task_db.run(work)
    assert (tries, conflicts, await details(task_db)) == (1, [], ["", ""])


def test_repeated_transactions_are_counted_by_database(monkeypatch: pytest.MonkeyPatch) -> None:
    from opentelemetry import metrics
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    reader = InMemoryMetricReader()
    monkeypatch.setattr(metrics, "get_meter", MeterProvider([reader]).get_meter)
    telemetry._conflicts.cache_clear()
    for database in ("TaskDB", "MyPilotDB", "TaskDB"):
        telemetry.count_conflict(database)
    telemetry._conflicts.cache_clear()
    data: Any = reader.get_metrics_data()
    [metric] = data.resource_metrics[0].scope_metrics[0].metrics
    assert metric.name == telemetry.DATABASE_CONFLICTS
    assert {point.attributes["database"]: point.value for point in metric.data.data_points} == {
        "TaskDB": 2,
        "MyPilotDB": 1,
    }
