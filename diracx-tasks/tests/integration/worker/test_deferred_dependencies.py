"""Lazy loading of the dependencies of tasks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from diracx.tasks.jobs import DummyJobExecutorTask
from diracx.tasks.plumbing.sql.databases import may_be_configured
from diracx.tasks.plumbing.worker.dependencies import Dependencies
from diracx.tasks.plumbing.worker.task_spec import task_specs
from diracx.tasks.testing import TaskSystem

SETTINGS = """
from contextlib import asynccontextmanager
from diracx.core.settings import ServiceSettingsBase

began, ended = [], []


class Shared(ServiceSettingsBase):
    colour: str = "red"

    @asynccontextmanager
    async def lifetime_function(self):
        began.append(self)
        yield
        ended.append(self)


class Late(Shared):
    colour: str = "blue"
"""
TASKS = """
from __future__ import annotations

from deferred_settings import Shared
from diracx.tasks.plumbing import BaseTask
from diracx.tasks.plumbing.lazy import lazy_names

__getattr__ = lazy_names(
    __name__, {"deferred_settings": ["Late"], "diracx.db.sql": ["JobDB"], "not_there_at_all": ["Lost"]}
)


class Eager(BaseTask):
    async def execute(self, shared: Shared) -> list:
        return [shared.colour]


class Deferred(BaseTask):
    async def execute(self, shared: Shared, late: Late) -> list:
        return [shared.colour, late.colour]


class Broken(BaseTask):
    async def execute(self, lost: Lost) -> None: ...


class Wanting(BaseTask):
    async def execute(self, job_db: JobDB) -> None: ...
"""


@pytest.fixture(autouse=True)
def _no_database_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("DIRACX_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "deferred_settings.py").write_text(SETTINGS)
    (tmp_path / "deferred_tasks.py").write_text(TASKS)
    import deferred_tasks

    yield deferred_tasks
    for name in ("deferred_settings", "deferred_tasks"):
        del sys.modules[name]


@pytest.mark.usefixtures("no_free_thread")
async def test_a_dependency_of_deferred_tasks_is_opened_by_the_first_and_closed_at_the_end(
    tasks: ModuleType, redis_url: str
) -> None:
    import deferred_settings as settings

    async with TaskSystem([tasks.Eager, tasks.Deferred], redis_url=redis_url, workers=1) as system:
        assert (await system.result(await tasks.Eager().schedule(), timeout=20)).return_value == ["red"]
        assert [each.colour for each in settings.began] == ["red"]
        for _ in range(2):
            done = await system.result(await tasks.Deferred().schedule(), timeout=20)
            assert done.return_value == ["red", "blue"], done.error
        assert [each.colour for each in settings.began] == ["red", "blue"]
        assert settings.ended == []
    assert [each.colour for each in settings.ended] == ["blue", "red"]


async def test_a_dependency_that_cannot_be_imported_fails_only_its_task(tasks: ModuleType, redis_url: str) -> None:
    async with TaskSystem([tasks.Eager, tasks.Deferred, tasks.Broken], redis_url=redis_url, workers=1) as system:
        broken = await system.result(await tasks.Broken().schedule(), timeout=20)
        assert broken.error is not None
        assert broken.error["type"] == "NameError"
        assert "No module named 'not_there_at_all'" in broken.error["message"]
        assert (await system.result(await tasks.Deferred().schedule(), timeout=20)).return_value == ["red", "blue"]
        assert (await system.result(await tasks.Eager().schedule(), timeout=20)).return_value == ["red"]


async def test_a_missing_database_is_named_in_the_error(
    tasks: ModuleType, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with TaskSystem([tasks.Wanting], redis_url=redis_url, workers=1, task_db_url=None) as system:
        assert "no database is configured: 1 tasks may need one" in caplog.text
        done = await system.result(await tasks.Wanting().schedule(), timeout=20)
        assert done.error is not None
        assert "JobDB.transaction is not available here" in done.error["message"]
    assert "1 tasks would fail here, for JobDB.transaction is not configured: test:Wanting" in caplog.text


async def test_new_settings_do_not_reload_dependencies(tasks: ModuleType, redis_url: str) -> None:
    import deferred_settings as settings

    async with TaskSystem([tasks.Deferred], redis_url=redis_url, workers=1) as system:
        for limit in (5, 6):
            system.reconfigure({"common": {"test:Deferred": {"time_limit_seconds": limit}}})
            done = await system.result(await tasks.Deferred().schedule(), timeout=20)
            assert done.return_value == ["red", "blue"], done.error
        assert len(settings.began) == 2


@pytest.mark.parametrize(
    "variable", ["DIRACX_DB_URL_JOBDB", "DIRACX_OS_DB_JOBPARAMETERSDB", "DIRACX_SERVICE_DOTENV_1"]
)
def test_nothing_is_deferred_if_a_database_may_be_configured(
    tasks: ModuleType, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diracx.tasks.plumbing import TasksConfig

    registry: dict[str, Any] = {"test:Deferred": tasks.Deferred, "jobs:DummyJobExecutorTask": DummyJobExecutorTask}
    assert not may_be_configured()
    assert "test:Deferred" in Dependencies(task_specs(registry, TasksConfig()), {}).deferred
    monkeypatch.setenv(variable, "sqlite+aiosqlite:///:memory:")
    found = Dependencies(task_specs(registry, TasksConfig()), {})
    assert (found.deferred, len(found.plans)) == (frozenset(), 2)
    with pytest.raises(NameError, match="Lost"):
        Dependencies(task_specs({"test:Broken": tasks.Broken}, TasksConfig()), {})
