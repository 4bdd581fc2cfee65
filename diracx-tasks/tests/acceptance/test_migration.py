"""The published package 0.7.0 and ours on one server, as processes. `make compat` runs all scenarios."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from benchmarks.compat.scenarios import MODULE, Tally, run, world
from benchmarks.peers.environments import is_ready

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(autouse=True, scope="module")
def _installed() -> None:
    if not is_ready("reference"):
        pytest.skip("the published package is not installed (`make servers` does it)")


@pytest.mark.parametrize("scenario", ["upgrade, killed", "rollback, killed"])
def test_nothing_is_lost_doubled_or_stuck(scenario: str, tmp_path: Path) -> None:
    assert run(scenario, tmp_path) == Tally()


@pytest.mark.parametrize("kind", ["sqlite", "mariadb"])  # all that 0.7 knows
async def test_dead_letters_of_0_7_are_imported_and_can_be_retried(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest, empty_database: Callable[[str], Awaitable[str]]
) -> None:
    if kind == "mariadb":
        request.getfixturevalue("mariadb_server")
    database = await empty_database(kind)
    await asyncio.to_thread(_import_dead_letters, tmp_path, database)


def _import_dead_letters(tmp_path: Path, database: str) -> None:
    with world(tmp_path) as new:
        new.database = database

        def ours(*arguments: str) -> str:
            command = [sys.executable, "-m", "diracx.tasks", *arguments]
            done = subprocess.run(
                command, env=new.environment(), capture_output=True, text=True, check=False, timeout=60
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        new.run("0.7", CREATE)
        worker = new.worker("0.7")
        new.run("0.7", _SUBMIT)
        new.until(lambda: new.log.read_text().count("Tried") == 2, "both have failed", 60)
        new.end([worker], kill=False)

        assert "2 dead letters of dlq_tasks" in ours("dlq", "init")
        assert "dlq_tasks" not in ours("dlq", "init"), "once"
        assert "number 7 is doomed" in ours("dlq", "list")
        shown = ours("dlq", "show", "1")
        assert all(text in shown for text in ("numbered:Doomed", "RuntimeError", "[7]"))
        assert "2 submitted again" in ours("dlq", "retry", "--all", "--yes", "--module", MODULE)
        worker = new.worker("ours")
        new.until(lambda: new.log.read_text().count("Tried") == 4, "both were tried again", 60)
        new.end([worker], kill=False)
        assert "dlq_tasks" not in ours("dlq", "init"), "nor what has failed again"


CREATE = """
import asyncio, os
from diracx.tasks.plumbing.persistence import TaskDB
async def create():
    db = TaskDB(os.environ["DIRACX_DB_URL_TASKDB"])
    async with db.engine_context(), db.engine.begin() as connection:
        await connection.run_sync(db.metadata.create_all)
asyncio.run(create())
"""
_SUBMIT = """
import asyncio, os
from benchmarks.compat.numbered import Doomed
from benchmarks.compat.submit import bound
async def submit():
    async with bound(os.environ["DIRACX_TASKS_REDIS_URL"]):
        for number in (7, 8):
            await Doomed(number).schedule()
asyncio.run(submit())
"""
