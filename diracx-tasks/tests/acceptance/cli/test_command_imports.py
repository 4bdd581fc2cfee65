"""Imports of commands, which determine their start time."""

from __future__ import annotations

import json
import sys

import pytest

TASKS = """
import sys
from diracx.tasks.plumbing import BaseTask

HEAVY = {
    "sqlalchemy", "fastapi", "starlette", "aiohttp", "opensearchpy",
    "diracx.db", "diracx.logic", "diracx.routers", "gubbins.db",
}


class Imported(BaseTask):
    async def execute(self) -> list:
        return sorted(HEAVY & sys.modules.keys())
"""


def test_a_worker_without_a_database_loads_none_and_no_web_framework(served):
    (served.directory / "lean_tasks.py").write_text(TASKS)
    worker = served.start("worker", "--module", "lean_tasks.py", new_python=True)
    worker.until("ready")
    assert "jobs:DummyJobExecutorTask" in worker.output, "the shipped tasks are there, too"
    done = served("submit", "lean_tasks:Imported", "--module", "lean_tasks.py", "--wait", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["return_value"] == []


@pytest.mark.leaves_keys("diracx:tasks:normal:large")
@pytest.mark.parametrize(
    "arguments",
    [
        ["list"],
        ["submit", "jobs:DummyJobExecutorTask", "--args", "[1]"],
        ["schedule", "list"],
        ["config", "check"],
        ["dlq", "list"],
        ["status", "--json"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_a_command_without_database_access_imports_no_database(served, arguments):
    program = f"""
import atexit, sys
from diracx.tasks.cli import main
def heavy():
    found = {{"sqlalchemy", "fastapi", "diracx.db", "diracx.core.settings"}} & sys.modules.keys()
    print("loaded", sorted(found), file=sys.stderr)
atexit.register(heavy)
sys.argv = ["diracx-task-run", *{arguments!r}]
main()
"""
    result = served(program=(sys.executable, "-c", program))
    assert "loaded []" in result.stderr, result.stderr
