"""Compiling and resolving the dependencies of a task, against real SQLite databases."""

import asyncio
import subprocess
import textwrap
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
from diracx.core.config import ConfigSource
from diracx.core.settings import DevelopmentSettings, ServiceSettingsBase
from diracx.core.sources import AsyncCacheableSource, Snapshot
from diracx.db.os import JobParametersDB
from diracx.db.sql import AuthDB, JobDB, JobLoggingDB, ResourceStatusDB
from diracx.db.sql.utils import BaseSQLDB
from diracx.logic.rss.source import SiteStatusSource
from diracx.tasks.plumbing.depends import AvailableSecurityProperties, Config, NoTransaction, auto_inject
from diracx.tasks.plumbing.exceptions import TaskConfigError
from diracx.tasks.plumbing.injection.plan import (
    Kind,
    compile_plan,
    find_missing_overrides,
    resolve,
    setup_dependency_overrides,
)
from diracx.tasks.plumbing.injection.providers import sql_overrides
from fastapi import Depends, Request
from sqlalchemy import Column, ForeignKey, Integer, MetaData, Table, event, func, insert, select
from sqlalchemy.exc import IntegrityError

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


async def run(execute: Any, overrides: dict[Any, Any]) -> Any:
    """Do what a worker does: resolve, execute, unwind."""
    plan = compile_plan(execute)
    async with AsyncExitStack() as stack:
        return await execute(**await resolve(plan, overrides, stack))


async def shelf_count(db: LibraryDB) -> int:
    async with db:
        return await db.count()


def idle(db: LibraryDB) -> bool:
    """No connection is checked out, and none is left in this context."""
    with pytest.raises(RuntimeError):
        _ = db.conn
    return db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


# --- P35, P36: transactions -------------------------------------------------------------------------------


async def test_success_commits(library: LibraryDB) -> None:
    async def execute(db: LibraryDB) -> str:
        await db.add_shelf(1)
        return "done"

    assert await run(execute, overrides_of(library)) == "done"
    assert idle(library)
    assert await shelf_count(library) == 1


@pytest.mark.parametrize("failure", [ValueError("no"), asyncio.CancelledError(), KeyboardInterrupt()])
async def test_P35_failed_execution_is_rolled_back(library: LibraryDB, failure: BaseException) -> None:
    async def execute(db: LibraryDB) -> None:
        await db.add_shelf(1)
        raise failure

    with pytest.raises(type(failure)) as caught:
        await run(execute, overrides_of(library))
    assert caught.value is failure
    assert idle(library)
    assert await shelf_count(library) == 0


async def test_P35_failed_commit_raises_and_closes_the_connection(library: LibraryDB) -> None:
    async def execute(db: LibraryDB) -> None:
        await db.add_shelf(1)
        await db.add_book_on_missing_shelf()

    with pytest.raises(IntegrityError):
        await run(execute, overrides_of(library))
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


# --- compiling --------------------------------------------------------------------------------------------


class Options:
    def __init__(self, name: str = "default") -> None:
        self.name = name


class SomeTask:
    async def execute(self, limit: int) -> None: ...

    async def relaxed(self, limit: int = 3, *args: int, **kwargs: "NotImported") -> "Missing": ...  # noqa: F821

    async def unresolvable(self, db: "NotImported") -> None: ...  # noqa: F821


def test_a_parameter_that_cannot_be_injected_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"SomeTask\.execute: parameter 'limit' \(int\)"):
        compile_plan(SomeTask.execute, skip_first=True)
    with pytest.raises(TypeError, match=r"^jobs:SomeTask: parameter 'limit'"):
        compile_plan(SomeTask.execute, skip_first=True, name="jobs:SomeTask")


def wants_request(request: Request) -> Request:
    return request


def test_dependency_that_needs_a_request_is_refused_by_name() -> None:
    async def execute(request: Annotated[Request, Depends(wants_request)]) -> None: ...

    with pytest.raises(TypeError, match=r"execute → wants_request: parameter 'request'"):
        compile_plan(execute)


def test_defaults_and_kwargs_are_allowed() -> None:
    assert compile_plan(SomeTask.relaxed, skip_first=True).dependencies == []


def test_annotation_that_cannot_be_resolved_is_named() -> None:
    with pytest.raises(NameError, match=r"SomeTask\.unresolvable: .*'NotImported' of parameter 'db'"):
        compile_plan(SomeTask.unresolvable, skip_first=True)


def test_injected_positional_only_parameter_is_refused() -> None:
    def execute(db: LibraryDB, /) -> None: ...

    with pytest.raises(TypeError, match="positional-only"):
        compile_plan(execute)


def loops(value: Annotated[int, Depends(lambda: 1)]) -> int:
    return value


loops.__annotations__["value"] = Annotated[int, Depends(loops)]


def test_dependency_on_itself_is_refused() -> None:
    with pytest.raises(TypeError, match="needs itself"):
        compile_plan(loops)


def test_plan_tells_kinds_through_decorators() -> None:
    @contextmanager
    def manager() -> Iterator[None]:
        yield

    @auto_inject
    async def coroutine() -> None: ...

    assert compile_plan(manager).kind is Kind.GENERATOR
    assert compile_plan(coroutine).kind is Kind.ASYNC
    assert compile_plan(_async_generator).kind is Kind.ASYNC_GENERATOR
    assert compile_plan(Options).kind is Kind.PLAIN


async def _async_generator() -> AsyncIterator[None]:
    yield


# --- resolving --------------------------------------------------------------------------------------------


async def test_dependency_used_twice_is_resolved_once_unless_it_says_otherwise() -> None:
    calls: list[int] = []

    def counted() -> int:
        calls.append(1)
        return len(calls)

    def nested(value: Annotated[int, Depends(counted)]) -> int:
        return value

    async def execute(
        a: Annotated[int, Depends(counted)],
        b: Annotated[int, Depends(nested)],
        c: Annotated[int, Depends(counted, use_cache=False)],
        d: int = Depends(counted),
    ) -> tuple[int, ...]:
        return a, b, c, d

    assert await run(execute, {}) == (1, 1, 2, 1)
    assert await run(execute, {}) == (3, 3, 4, 3)  # nothing is kept from one execution to the next


async def test_override_has_dependencies_of_its_own() -> None:
    def original() -> str:
        raise AssertionError("overridden")

    def name() -> str:
        return "override"

    async def override(name: Annotated[str, Depends(name)]) -> str:
        return f"the {name}"

    async def execute(value: Annotated[str, Depends(original)]) -> str:
        return value

    assert await run(execute, {original: override}) == "the override"


async def test_bare_depends_means_the_annotated_type() -> None:
    async def execute(options: Annotated[Options, Depends()]) -> str:
        return options.name

    assert await run(execute, {}) == "default"


async def test_plan_without_dependencies_needs_neither_stack_nor_overrides() -> None:
    async def execute() -> None: ...

    assert await resolve(compile_plan(execute), None, None) == {}  # type: ignore[arg-type]


async def test_missing_sentinel_is_named_at_run_time() -> None:
    async def execute(db: JobDB) -> None: ...

    with pytest.raises(RuntimeError, match=r"JobDB\.transaction is not available"):
        await run(execute, {})


# --- find_missing_overrides, setup_dependency_overrides ---------------------------------------------------


def nested_auth(db: AuthDB) -> AuthDB:
    return db


class ShelfSettings(ServiceSettingsBase):
    model_config: ClassVar[Any] = {"env_prefix": "TEST_SHELF_"}
    width: int
    _events: ClassVar[list[str]] = []

    @asynccontextmanager
    async def lifetime_function(self) -> AsyncIterator[None]:
        self._events.append("started")
        yield
        self._events.append("stopped")


async def wants_a_lot(
    db: JobDB,
    bare: Annotated[JobDB, NoTransaction()],
    config: Config,
    parameters: JobParametersDB,
    development: DevelopmentSettings,
    shelf: ShelfSettings,
    properties: AvailableSecurityProperties,
    sites: SiteStatusSource,
    auth: Annotated[AuthDB, Depends(nested_auth)],
) -> None: ...


EVERYTHING = [
    "JobDB.transaction",
    "JobDB.no_transaction",
    "ConfigSource.create",
    "JobParametersDB.session",
    "ShelfSettings.create",
    "SiteStatusSource.create",
    "AuthDB.transaction",
]


def test_missing_overrides_of_a_plan_and_of_a_fastapi_dependant() -> None:
    from fastapi.dependencies.utils import get_dependant

    plan = compile_plan(wants_a_lot)
    dependant = get_dependant(path="/", call=_with_resolved_leaves())
    assert find_missing_overrides(plan, {}) == EVERYTHING
    assert find_missing_overrides(dependant, {}) == EVERYTHING[:-1]
    found = find_missing_overrides(plan, {JobDB.transaction: object, nested_auth: object})
    assert found == EVERYTHING[1:-1]


def _with_resolved_leaves() -> Any:
    """FastAPI does not look into plain functions for databases, so leave that one out."""
    import inspect

    injected = auto_inject(wants_a_lot)
    signature = inspect.signature(injected)
    kept = [param for name, param in signature.parameters.items() if name != "auth"]

    def call() -> None: ...

    call.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    return call


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    import os

    for name in list(os.environ):
        if name.startswith(("DIRACX_DB_URL_", "DIRACX_OS_DB_", "DIRACX_CONFIG_", "DIRACX_SERVICE_DOTENV")):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def config_repository(tmp_path: Path) -> str:
    repository = tmp_path / "configuration"
    repository.mkdir()
    (repository / "default.yml").write_text(
        textwrap.dedent(
            """
            DIRAC: {}
            Operations: {Defaults: {}}
            Registry:
              lhcb:
                IdP: {URL: "https://idp.invalid", ClientID: "id"}
                DefaultGroup: user
                Users: {}
                Groups: {}
            """
        )
    )
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@invalid"]
    for command in (["init", "-q", "-b", "master"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], cwd=repository, check=True)
    return f"git+file://{repository}"


async def test_setup_opens_what_the_plans_need_and_no_more(
    clean_environment: pytest.MonkeyPatch, config_repository: str, tmp_path: Path
) -> None:
    for name in ("AUTHDB", "JOBDB", "JOBLOGGINGDB", "RESOURCESTATUSDB"):
        clean_environment.setenv(f"DIRACX_DB_URL_{name}", f"sqlite+aiosqlite:///{tmp_path}/{name}.db")
    clean_environment.setenv("DIRACX_OS_DB_JOBPARAMETERSDB", '{"hosts": "http://localhost:1"}')
    clean_environment.setenv("DIRACX_CONFIG_BACKEND_URL", config_repository)
    clean_environment.setenv("TEST_SHELF_WIDTH", "80")
    seen: dict[str, Any] = {}

    async def execute(
        job: JobDB,
        bare: Annotated[JobDB, NoTransaction()],
        config: Config,
        parameters: JobParametersDB,
        development: DevelopmentSettings,
        shelf: ShelfSettings,
        properties: AvailableSecurityProperties,
        auth: Annotated[AuthDB, Depends(nested_auth)],
    ) -> None:
        assert isinstance(job, JobDB)
        assert job is bare
        assert list(config.registry) == ["lhcb"]
        assert parameters.client is not None
        assert shelf.width == 80
        assert properties
        assert auth.conn is not None
        seen["job"] = job

    plan = compile_plan(execute)
    async with setup_dependency_overrides([plan]) as overrides:
        assert find_missing_overrides(plan, overrides) == []
        assert JobLoggingDB.transaction not in overrides
        assert ResourceStatusDB.transaction not in overrides
        assert SiteStatusSource.create not in overrides
        assert overrides[ShelfSettings.create]() is overrides[ShelfSettings.create]()
        assert ShelfSettings._events == ["started"]
        await run(execute, overrides)
        await run(execute, overrides)
    assert ShelfSettings._events == ["started", "stopped"]
    with pytest.raises(AssertionError, match="engine_context"):
        _ = seen["job"].engine


async def test_setup_for_plans_without_needs_opens_nothing(clean_environment: pytest.MonkeyPatch) -> None:
    clean_environment.setenv("DIRACX_DB_URL_JOBDB", "sqlite+aiosqlite:///:memory:")

    async def execute(properties: AvailableSecurityProperties) -> None: ...

    async with setup_dependency_overrides([compile_plan(execute)]) as overrides:
        assert overrides == {}


async def test_setup_without_plans_opens_whatever_is_available(
    clean_environment: pytest.MonkeyPatch, config_repository: str
) -> None:
    clean_environment.setenv("DIRACX_DB_URL_RESOURCESTATUSDB", "sqlite+aiosqlite:///:memory:")
    clean_environment.setenv("DIRACX_CONFIG_BACKEND_URL", config_repository)
    async with setup_dependency_overrides() as overrides:
        for available in (
            ResourceStatusDB.transaction,
            ResourceStatusDB.no_transaction,
            SiteStatusSource.create,
            ConfigSource.create,
            DevelopmentSettings.create,
        ):
            assert available in overrides
        for missing in (JobDB.transaction, JobParametersDB.session):
            assert missing not in overrides


async def test_what_is_not_configured_is_absent(clean_environment: pytest.MonkeyPatch) -> None:
    clean_environment.delenv("TEST_SHELF_WIDTH", raising=False)
    plan = compile_plan(wants_a_lot)
    async with setup_dependency_overrides([plan]) as overrides:
        assert find_missing_overrides(plan, overrides) == EVERYTHING


async def test_settings_that_cannot_be_read_are_logged_without_their_value(
    clean_environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clean_environment.setenv("TEST_SHELF_WIDTH", "s3cret")

    async def execute(shelf: ShelfSettings) -> None: ...

    async with setup_dependency_overrides([compile_plan(execute)]) as overrides:
        assert overrides == {}
    assert "ShelfSettings cannot be read from the environment: width:" in caplog.text
    assert "s3cret" not in caplog.text


async def test_malformed_database_url_is_refused_without_its_password(
    clean_environment: pytest.MonkeyPatch,
) -> None:
    clean_environment.setenv("DIRACX_DB_URL_JOBDB", "invalid://user:s3cret@host/db")

    async def execute(db: JobDB) -> None: ...

    with pytest.raises(TaskConfigError, match="DIRACX_DB_URL_") as caught:
        async with setup_dependency_overrides([compile_plan(execute)]):
            raise AssertionError("never gets here")
    assert "s3cret" not in str(caught.value)


class ShelfSource(AsyncCacheableSource[Snapshot[int]]):
    """Reads the same database as the task that uses it."""

    db_class = ResourceStatusDB

    def __init__(self, *, db: ResourceStatusDB) -> None:
        super().__init__()
        self._db = db

    async def latest_revision(self) -> tuple[str, datetime]:
        return "first", datetime(2024, 1, 1, tzinfo=UTC)

    async def read_raw(self, hexsha: str, modified: datetime) -> Snapshot[int]:
        async with self._db as db:
            return Snapshot((await db.conn.execute(select(41 + 1))).scalar_one(), hexsha, modified)


async def test_source_can_read_the_database_of_the_running_transaction(
    clean_environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clean_environment.setenv("DIRACX_DB_URL_RESOURCESTATUSDB", f"sqlite+aiosqlite:///{tmp_path}/rss.db")

    async def execute(db: ResourceStatusDB, shelf: ShelfSource) -> int:
        assert db.conn is not None
        assert isinstance(shelf, Snapshot)
        return shelf.data

    async def only_source(shelf: ShelfSource) -> int:
        return shelf.data  # type: ignore[attr-defined, no-any-return]

    for function in (execute, only_source):
        async with setup_dependency_overrides([compile_plan(function)]) as overrides:
            assert await run(function, overrides) == 42


async def test_a_dependency_with_a_default_is_done_without_where_it_is_not_configured() -> None:
    async def execute(self: object, config: Config = None) -> Any:  # type: ignore[assignment]
        return config

    plan = compile_plan(execute, skip_first=True)
    assert find_missing_overrides(plan, {}) == []
    async with AsyncExitStack() as stack:
        assert await resolve(plan, {}, stack) == {}
        assert await resolve(plan, {ConfigSource.create: lambda: "there"}, stack) == {"config": "there"}
