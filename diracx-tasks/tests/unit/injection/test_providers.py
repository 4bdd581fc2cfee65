"""Providers open exactly the dependencies of the plans, from the environment."""

import os
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
from diracx.core.config import ConfigSource
from diracx.core.settings import AuthSettings, DevelopmentSettings, ServiceSettingsBase
from diracx.core.sources import AsyncCacheableSource, Snapshot
from diracx.db.os import JobParametersDB
from diracx.db.sql import AuthDB, JobDB, JobLoggingDB, ResourceStatusDB
from diracx.logic.rss.source import SiteStatusSource
from diracx.tasks.plumbing.depends import AvailableSecurityProperties, Config, NoTransaction, auto_inject
from diracx.tasks.plumbing.exceptions import TaskConfigError
from diracx.tasks.plumbing.injection.placeholders import find_missing_overrides
from diracx.tasks.plumbing.injection.plan import compile_plan, resolve
from diracx.tasks.plumbing.injection.providers import setup_dependency_overrides
from fastapi import Depends
from sqlalchemy import select
from support.distributions import install_distribution
from support.library import run

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
    """FastAPI does not search plain functions for databases, so omit that one."""
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

    from diracx.db.os.utils import BaseOSDB

    for name in list(os.environ):
        if name.startswith(("DIRACX_DB_URL_", "DIRACX_OS_DB_", "DIRACX_CONFIG_", "DIRACX_SERVICE_DOTENV")):
            monkeypatch.delenv(name)
    # The client factory of DiracX puts databases of its own there, for as long as its process lives.
    if isinstance(BaseOSDB.available_implementations, partial):
        real = BaseOSDB.available_implementations.keywords["real_available_implementations"]
        monkeypatch.setattr(BaseOSDB, "available_implementations", real)
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


async def test_setup_opens_only_dependencies_of_the_plans(
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


async def test_setup_without_plans_opens_all_databases_and_the_configuration(
    clean_environment: pytest.MonkeyPatch, config_repository: str
) -> None:
    clean_environment.setenv("DIRACX_DB_URL_RESOURCESTATUSDB", "sqlite+aiosqlite:///:memory:")
    clean_environment.setenv("DIRACX_CONFIG_BACKEND_URL", config_repository)
    async with setup_dependency_overrides() as overrides:
        assert overrides.keys() == {
            ResourceStatusDB.transaction,
            ResourceStatusDB.no_transaction,
            ConfigSource.create,
        }


async def test_a_dependency_that_is_not_configured_is_absent(clean_environment: pytest.MonkeyPatch) -> None:
    clean_environment.delenv("TEST_SHELF_WIDTH", raising=False)
    plan = compile_plan(wants_a_lot)
    async with setup_dependency_overrides([plan]) as overrides:
        assert find_missing_overrides(plan, overrides) == EVERYTHING


@pytest.mark.parametrize(
    ("settings", "name", "value", "reason"),
    [
        (ShelfSettings, "TEST_SHELF_WIDTH", "s3cret", "width:"),
        (AuthSettings, "DIRACX_SERVICE_AUTH_TOKEN_KEYSTORE", "file:///does/not/exist.jwks", "[Errno 2]"),
    ],
)
async def test_settings_that_cannot_be_read_are_left_out_and_no_value_but_a_missing_file_is_logged(
    clean_environment: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    settings: type[ServiceSettingsBase],
    name: str,
    value: str,
    reason: str,
) -> None:
    clean_environment.setenv(name, value)

    async def execute(given: settings) -> None: ...  # type: ignore[valid-type]  # injected by its type

    async with setup_dependency_overrides([compile_plan(execute)]) as overrides:
        assert overrides == {}
    assert f"{settings.__name__} cannot be read from the environment: {reason}" in caplog.text
    assert ("/does/not/exist.jwks" in caplog.text) == ("exist" in value)
    assert "s3cret" not in caplog.text


@pytest.mark.parametrize(
    ("value", "message"),
    [("0", "ListSettings cannot be read"), ("[0]", None), ("s3cret", 'error parsing value for field "widths"')],
)
async def test_settings_that_are_not_json_leave_all_others_open(
    value: str, message: str | None, clean_environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class ListSettings(ServiceSettingsBase):
        model_config: ClassVar[Any] = {"env_prefix": "TEST_LIST_"}
        widths: list[int]

    async def execute(lists: ListSettings, shelf: ShelfSettings) -> None: ...

    clean_environment.setenv("TEST_SHELF_WIDTH", "3")
    clean_environment.setenv("TEST_LIST_WIDTHS", value)
    async with setup_dependency_overrides([compile_plan(execute)]) as overrides:
        assert ShelfSettings.create in overrides
        assert (ListSettings.create in overrides) is (message is None)
    assert (message or "") in caplog.text
    assert "s3cret" not in caplog.text


_WITH_BROKEN_CLASSES = """
import asyncio
from diracx.db.os import JobParametersDB
from diracx.logic.rss.source import SiteStatusSource
from diracx.tasks.plumbing.injection.placeholders import find_missing_overrides
from diracx.tasks.plumbing.injection.plan import compile_plan
from diracx.tasks.plumbing.injection.providers import setup_dependency_overrides

async def execute(sites: SiteStatusSource, parameters: JobParametersDB) -> None: ...

async def main():
    plan = compile_plan(execute)
    async with setup_dependency_overrides([plan]) as overrides:
        print(find_missing_overrides(plan, overrides))

asyncio.run(main())
"""


def run_with_broken_classes(
    tmp_path: Path, names: dict[str, str], code: str = "raise ImportError"
) -> subprocess.CompletedProcess[str]:
    entry_points = {f"diracx.{group}": f"{name} = Nothing" for group, name in names.items()}
    install_distribution(tmp_path, "diracx.broken", code, entry_points)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("DIRACX_")},
        "PYTHONPATH": str(tmp_path),
        "DIRACX_DB_URL_RESOURCESTATUSDB": "sqlite+aiosqlite:///:memory:",
        "DIRACX_DB_URL_LOSTSQLDB": "sqlite+aiosqlite:///:memory:",
        "DIRACX_OS_DB_JOBPARAMETERSDB": '{"hosts": "localhost:1"}',
        "DIRACX_OS_DB_LOSTOSDB": '{"hosts": "localhost:1"}',
    }
    return subprocess.run(
        [sys.executable, "-c", _WITH_BROKEN_CLASSES], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("code", ["raise ImportError", "import sys\nsys.exit(3)"])
def test_classes_of_entry_points_that_cannot_be_imported_are_named_and_left_out(tmp_path: Path, code: str) -> None:
    names = {"cacheable_sources": "LostSource", "dbs.os": "LostOSDB", "dbs.sql": "LostSQLDB"}
    done = run_with_broken_classes(tmp_path, names, code)
    assert done.stdout == "[]\n", done.stderr
    for name in ("source LostSource", "database LostOSDB", "database LostSQLDB"):
        assert f"The {name} is left out" in done.stderr


def test_no_other_class_replaces_one_of_a_source_that_cannot_be_imported(tmp_path: Path) -> None:
    """It may be the one of an extension, which gives other values than that of DiracX."""
    done = run_with_broken_classes(tmp_path, {"cacheable_sources": "site_status"})
    assert done.stdout == "['SiteStatusSource.create']\n", done.stderr
    assert "The source site_status is left out" in done.stderr


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


async def test_a_dependency_with_a_default_may_be_unconfigured() -> None:
    async def execute(self: object, config: Config = None) -> Any:  # type: ignore[assignment]
        return config

    plan = compile_plan(execute, skip_first=True)
    assert find_missing_overrides(plan, {}) == []
    async with AsyncExitStack() as stack:
        assert await resolve(plan, {}, stack) == {}
        assert await resolve(plan, {ConfigSource.create: lambda: "there"}, stack) == {"config": "there"}
