"""The domain tasks of the job system, on real (SQLite) databases."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from diracx.core.config import Config, ConfigSource
from diracx.core.models import UserInfo
from diracx.db.sql import JobDB, JobLoggingDB, TaskQueueDB
from diracx.db.sql.utils import BaseSQLDB
from diracx.logic.jobs.submission import submit_jdl_jobs
from diracx.tasks.jobs import DummyJobExecutorMonitorTask, DummyJobExecutorTask
from diracx.tasks.jobs.dummy_job_executor import DummyJobExecutorSettings
from diracx.tasks.plumbing.injection.providers import sql_overrides
from diracx.tasks.testing import TaskSystem
from pydantic import ValidationError

Overrides = dict[Callable[..., Any], Callable[..., Any]]
CONFIG = Config.model_validate(
    {
        "DIRAC": {},
        "Operations": {"Defaults": {}},
        "Registry": {
            "lhcb": {
                "DefaultGroup": "lhcb_user",
                "IdP": {"URL": "https://idp.invalid", "ClientID": "test"},
                "Users": {"sub": {"PreferedUsername": "jdoe"}},
                "Groups": {"lhcb_user": {"Properties": ["NormalUser"], "Users": ["sub"]}},
            }
        },
    }
)


@pytest.fixture
async def databases(tmp_path: Path) -> AsyncIterator[dict[type[BaseSQLDB], BaseSQLDB]]:
    async with AsyncExitStack() as stack:
        databases: dict[type[BaseSQLDB], BaseSQLDB] = {}
        for database_class in (JobDB, JobLoggingDB, TaskQueueDB):
            database = database_class(f"sqlite+aiosqlite:///{tmp_path}/{database_class.__name__}.sqlite")
            await stack.enter_async_context(database.engine_context())
            async with database.engine.begin() as connection:
                await connection.run_sync(database.metadata.create_all)
                await database.post_create(connection)
            databases[database_class] = database
        yield databases


async def test_received_jobs_reach_the_state_done(
    databases: dict[type[BaseSQLDB], BaseSQLDB], redis_url: str
) -> None:
    job_db, logging_db = databases[JobDB], databases[JobLoggingDB]
    user = UserInfo(sub="lhcb:sub", preferred_username="jdoe", dirac_group="lhcb_user", vo="lhcb", policies={})
    async with job_db, logging_db:
        inserted = await submit_jdl_jobs(
            ['Executable = "echo"; JobName = "x";'] * 3, job_db, logging_db, user, CONFIG
        )
    job_ids = sorted(job.job_id for job in inserted)
    overrides: Overrides = {ConfigSource.create: lambda: CONFIG}
    for database in databases.values():
        overrides |= sql_overrides(database)
    tasks = {
        "jobs:DummyJobExecutorMonitorTask": DummyJobExecutorMonitorTask,
        "jobs:DummyJobExecutorTask": DummyJobExecutorTask,
    }
    async with TaskSystem(tasks, redis_url=redis_url, overrides=overrides, concurrency=1) as system:
        result = await system.result(await DummyJobExecutorMonitorTask().schedule(), timeout=20)
        assert result.return_value == 3, result.error
        await system.drain(timeout=20)
        async with job_db:
            _, jobs = await job_db.search(["JobID", "Status"], [], [])
        assert sorted((job["JobID"], job["Status"]) for job in jobs) == [(job_id, "Done") for job_id in job_ids]


@pytest.mark.parametrize("spelling", [str.upper, str.lower])
def test_settings_of_the_simulated_execution_are_variables(
    spelling: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    enabled, interval = (f"DIRACX_TASKS_DUMMY_JOB_EXECUTOR_{name}" for name in ("ENABLED", "INTERVAL_SECONDS"))
    monkeypatch.setenv(spelling(enabled), "true")
    monkeypatch.setenv(spelling(interval), "3")
    expected = DummyJobExecutorSettings(enabled=True, interval_seconds=3)
    assert DummyJobExecutorSettings.from_environment() == expected
    monkeypatch.setenv(spelling(interval), "0")
    with pytest.raises(ValidationError, match=interval):
        DummyJobExecutorSettings.from_environment()
