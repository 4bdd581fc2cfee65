"""Injected databases: one transaction per execution, and the order of commit and close."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import pytest
from diracx.tasks.plumbing.depends import NoTransaction
from diracx.tasks.plumbing.injection.providers import sql_overrides
from fastapi import Depends
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError
from support.library import LibraryDB, metadata, run


class ExtendedLibraryDB(LibraryDB):
    """Database that an extension derives."""


class OtherDB(LibraryDB):
    """A second database of one execution."""


@asynccontextmanager
async def opened(db: LibraryDB) -> AsyncIterator[LibraryDB]:
    async with db.engine_context():

        @event.listens_for(db.engine.sync_engine, "connect")
        def enforce_foreign_keys(connection: Any, _record: Any) -> None:
            connection.execute("PRAGMA foreign_keys=ON")

        async with db.engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
        yield db


@pytest.fixture
async def library(tmp_path: Path) -> AsyncIterator[LibraryDB]:
    async with opened(ExtendedLibraryDB(f"sqlite+aiosqlite:///{tmp_path}/library.db")) as db:
        yield db


@pytest.fixture
async def other(tmp_path: Path) -> AsyncIterator[LibraryDB]:
    async with opened(OtherDB(f"sqlite+aiosqlite:///{tmp_path}/other.db")) as db:
        yield db


def overrides_of(db: LibraryDB) -> dict[Any, Any]:
    return sql_overrides(db, [ExtendedLibraryDB, LibraryDB])


async def shelf_count(db: LibraryDB) -> int:
    async with db:
        return await db.count()


def idle(db: LibraryDB) -> bool:
    """No connection is checked out, and none is left in this context."""
    with pytest.raises(RuntimeError):
        _ = db.conn
    return db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


# --- P35, P36: transactions -------------------------------------------------------------------------------


async def test_a_successful_execution_commits_its_transaction(library: LibraryDB) -> None:
    async def execute(db: LibraryDB) -> str:
        await db.add_shelf(1)
        return "done"

    assert await run(execute, overrides_of(library)) == "done"
    assert idle(library)
    assert await shelf_count(library) == 1


@pytest.mark.parametrize(
    "failure", [ValueError("no"), asyncio.CancelledError(), KeyboardInterrupt(), None], ids=repr
)
async def test_P35_failed_execution_or_commit_is_rolled_back_and_closes_the_connection(
    library: LibraryDB, failure: BaseException | None
) -> None:
    """None: the commit fails."""

    async def execute(db: LibraryDB) -> None:
        await db.add_shelf(1)
        if failure is not None:
            raise failure
        await db.add_book_on_missing_shelf()

    with pytest.raises(IntegrityError if failure is None else type(failure)) as caught:
        await run(execute, overrides_of(library))
    assert failure in (None, caught.value)
    assert idle(library)
    assert await shelf_count(library) == 0


async def test_P35_failed_commit_rolls_back_the_databases_opened_before(
    library: LibraryDB, other: LibraryDB
) -> None:
    async def execute(first: LibraryDB, second: OtherDB) -> None:
        await first.add_shelf(1)
        await second.add_shelf(1)
        await second.add_book_on_missing_shelf()

    with pytest.raises(IntegrityError):
        await run(execute, {**overrides_of(library), **sql_overrides(other)})
    assert idle(library)
    assert idle(other)
    assert await shelf_count(library) == await shelf_count(other) == 0


async def test_P35_an_execution_that_is_cancelled_while_it_is_rolled_back_closes_the_connection(
    library: LibraryDB,
) -> None:
    begun = asyncio.Event()

    async def execute(db: LibraryDB) -> None:
        await db.add_shelf(1)
        begun.set()
        await asyncio.Event().wait()

    for rounds in range(10):
        begun.clear()
        running = asyncio.create_task(run(execute, overrides_of(library)))
        await begun.wait()
        running.cancel()
        for _ in range(rounds):
            await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        async with asyncio.timeout(30):
            while library.engine.pool.checkedout():  # type: ignore[attr-defined]
                await asyncio.sleep(0.01)
    assert await shelf_count(library) == 0


async def test_P35_dependency_that_swallows_the_failure_cannot_make_it_a_commit(library: LibraryDB) -> None:
    @contextmanager
    def careless() -> Iterator[None]:
        with suppress(ValueError):
            yield

    async def execute(db: LibraryDB, guard: Annotated[None, Depends(careless)]) -> None:
        await db.add_shelf(1)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await run(execute, overrides_of(library))
    assert await shelf_count(library) == 0


async def test_P36_second_dependency_failing_closes_the_first(library: LibraryDB) -> None:
    closed: list[str] = []

    def first() -> Iterator[int]:
        try:
            yield 1
        finally:
            closed.append("first")

    async def writes(db: LibraryDB) -> None:
        await db.add_shelf(1)

    async def broken() -> None:
        raise OSError("down")

    async def execute(
        db: LibraryDB,
        a: Annotated[int, Depends(first)],
        b: Annotated[None, Depends(writes)],
        c: Annotated[None, Depends(broken)],
    ) -> None:
        raise AssertionError("never runs")

    with pytest.raises(OSError, match="down"):
        await run(execute, overrides_of(library))
    assert closed == ["first"]
    assert idle(library)
    assert await shelf_count(library) == 0


async def test_P36_everything_is_closed_in_reverse_order() -> None:
    events: list[str] = []

    def generator() -> Iterator[str]:
        events.append("open generator")
        yield "generator"
        events.append("close generator")

    async def async_generator() -> AsyncIterator[str]:
        events.append("open async generator")
        yield "async generator"
        events.append("close async generator")

    @contextmanager
    def manager() -> Iterator[str]:
        events.append("open manager")
        yield "manager"
        events.append("close manager")

    @asynccontextmanager
    async def async_manager() -> AsyncIterator[str]:
        events.append("open async manager")
        yield "async manager"
        events.append("close async manager")

    async def execute(
        a: Annotated[str, Depends(generator)],
        b: Annotated[str, Depends(async_generator)],
        c: Annotated[str, Depends(manager)],
        d: Annotated[str, Depends(async_manager)],
    ) -> list[str]:
        return [a, b, c, d]

    names = ["generator", "async generator", "manager", "async manager"]
    assert await run(execute, {}) == names
    assert events == [f"open {name}" for name in names] + [f"close {name}" for name in reversed(names)]


async def test_one_transaction_per_execution_even_through_a_class_and_its_extension(
    library: LibraryDB,
) -> None:
    def nested(db: LibraryDB) -> LibraryDB:
        return db

    async def execute(
        db: LibraryDB,
        extended: ExtendedLibraryDB,
        through: Annotated[LibraryDB, Depends(nested)],
        bare: Annotated[LibraryDB, NoTransaction()],
    ) -> None:
        assert db is extended is through is bare is library
        assert library.engine.pool.checkedout() == 1  # type: ignore[attr-defined]

    await run(execute, overrides_of(library))
    assert idle(library)


async def test_no_transaction_leaves_transactions_to_the_task(library: LibraryDB) -> None:
    async def execute(db: Annotated[LibraryDB, NoTransaction()]) -> None:
        assert idle(db)
        async with db:
            await db.add_shelf(1)
        raise ValueError("after the commit")

    with pytest.raises(ValueError, match="after"):
        await run(execute, overrides_of(library))
    assert await shelf_count(library) == 1


async def test_parallel_executions_have_a_transaction_each(library: LibraryDB) -> None:
    connections = set()

    barrier = asyncio.Barrier(3)

    async def execute(db: LibraryDB) -> None:
        connections.add(id(db.conn))
        async with asyncio.timeout(10):
            await barrier.wait()

    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(run(execute, overrides_of(library)))
    assert len(connections) == 3
    assert idle(library)
