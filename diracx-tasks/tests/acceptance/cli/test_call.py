"""The command `call`: runs a task in this process with its locks and dependencies, optionally in a debugger."""

from __future__ import annotations

import json

import pytest
from diracx.tasks.plumbing import LockedObjectType, MutexLock
from redis import Redis
from support.command_line import COUNT_DEAD_LETTERS


def test_call_prints_the_value(served):
    result = served.mine("call", "my_tasks:Greet", "--args", '["x"]', "--kwargs", '{"times": 2}')
    assert (result.returncode, result.stdout) == (0, "Result: Hello x Hello x\n")


def test_P52_call_runs_a_task_that_spawns(served, redis_url):
    result = served.mine("call", "my_tasks:Spawn", "--json")
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)) == 3
    assert "spawning" in result.stderr  # with --json, stdout is for the value alone
    with Redis.from_url(redis_url) as client:
        assert client.xlen("diracx:tasks:normal:medium") == 3
        client.flushall()


def test_P52_call_checks_name_and_arguments(served, one_line):
    one_line(served.mine("call", "my_tasks:Greet"), 2, "missing argument")


def test_a_task_that_raises_shows_its_own_traceback_without_passwords(served):
    result = served.mine("call", "my_tasks:Fail")
    assert result.returncode == 1
    assert result.stdout == ""
    assert "my_tasks.py" in result.stderr
    assert "/cli/" not in result.stderr
    assert "sesame" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: my_tasks:Fail failed: ValueError")


async def test_call_takes_the_structural_locks_and_releases_them(served, redis, one_line):
    mutex = MutexLock(LockedObjectType("task"), "k", ttl_ms=60_000)
    assert await mutex.acquire(redis)
    one_line(served.mine("call", "my_tasks:Locked", "--args", '["k"]'), 1, "my_tasks:Locked", "lock:mutex:task:k")
    await mutex.release(redis)
    for _ in range(2):  # given back at the end; and the limiter of one slot is not asked at all
        await redis.zadd("limiter:conc:task:k", {"another": 2**50})
        result = served.mine("call", "my_tasks:Locked", "--args", '["k"]')
        assert result.stdout == "Result: ran\n", result.stderr
    await redis.delete("limiter:conc:task:k")


def test_the_debugger_stops_before_the_task(served):
    result = served.mine(
        "call", "my_tasks:Greet", "--args", '["x"]', "--debugger", "before", typed="p 'name:', task.name\ns\nc\n"
    )
    assert result.returncode == 0, result.stderr
    assert "('name:', 'x')" in result.stdout
    assert "my_tasks.py" in result.stdout  # the step went into execute()
    assert result.stdout.endswith("Result: Hello x\n")


def test_quitting_the_debugger_releases_the_locks(served, one_line):
    quits = served.mine("call", "my_tasks:Locked", "--args", '["k"]', "--debugger", "before", typed="q\n")
    one_line(quits, 1, "stopped in the debugger")  # the fixture looks for what is left on the server


def test_a_task_keeps_its_locks_while_the_debugger_waits_at_its_prompt(served):
    served.add_tasks("""
class Briefly(BaseTask):
    @property
    def execution_locks(self):
        return [MutexLock(LockedObjectType("task"), "k", ttl_ms=600)]

    async def execute(self) -> str:
        return "ran"
""")
    waits = "import time\ntime.sleep(2)\nc\n"
    result = served.mine("call", "my_tasks:Briefly", "--debugger", "before", typed=waits)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("Result: ran\n")


def test_the_debugger_opens_where_the_task_raised(served):
    result = served.mine("call", "my_tasks:Fail", "--debugger", "exception", typed="p type(self).__name__\nq\n")
    assert result.returncode == 1
    assert "'Fail'" in result.stdout


def test_a_database_that_is_not_configured_is_reported_in_one_line(served, one_line):
    served.add_tasks(COUNT_DEAD_LETTERS)
    one_line(served.mine("call", "my_tasks:CountDeadLetters"), 1, "TaskDB", "DIRACX_DB_URL_TASKDB")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite+aiosqlite:///{}/empty.db", ["TaskDB", "not initialised", "diracx-task-run dlq init"]),
        ("sqlite+aiosqlite:///{}/nowhere/at.db", ["TaskDB", "cannot be opened", "DIRACX_DB_URL_TASKDB"]),
        ("mysql+aiomysql://user:sesame@127.0.0.1:1/tasks", ["TaskDB", "cannot reach", "DIRACX_DB_URL_TASKDB"]),
        ("no database at all:sesame@", ["DIRACX_DB_URL_TASKDB", "valid database URL"]),
    ],
)
def test_a_database_that_is_down_or_empty_is_reported_in_one_line(served, one_line, tmp_path, url, said):
    served.environment["DIRACX_DB_URL_TASKDB"] = url.format(tmp_path)
    served.add_tasks(COUNT_DEAD_LETTERS)
    for command in (["call", "my_tasks:CountDeadLetters"], ["worker"]):
        result = served.mine(*command)
        one_line(result, 1, *said)
        assert "sesame" not in result.stderr


def test_call_gives_the_task_its_database(served, initialised_task_db):
    served.environment["DIRACX_DB_URL_TASKDB"] = initialised_task_db
    served.add_tasks(COUNT_DEAD_LETTERS)
    result = served.mine("call", "my_tasks:CountDeadLetters", "--json")
    assert (result.returncode, result.stdout) == (0, "0\n"), result.stderr
