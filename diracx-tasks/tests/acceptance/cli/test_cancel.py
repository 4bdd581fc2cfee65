"""The command `cancel`: reports where each task was, and fails for unknown ids."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from redis import Redis


@pytest.fixture
def server(redis_url: str) -> Iterator[Redis]:
    with Redis.from_url(redis_url, decode_responses=True) as client:
        yield client
        client.flushall()


def test_cancel_removes_queued_and_delayed_tasks(served, server, one_line):
    queued = served.mine("submit", "my_tasks:Urgent").stdout.split()[-1]
    delayed = served.mine("submit", "my_tasks:Urgent", "--at", "2130-01-31T12:00:00+01:00").stdout.split()[-1]
    result = served("cancel", queued, delayed)
    assert result.returncode == 0
    assert result.stdout.splitlines() == [f"{queued}  queued", f"{delayed}  delayed"]
    assert server.keys("*") == [] or server.xlen("diracx:tasks:realtime:small") == 0
    assert not server.exists("diracx:tasks:delayed", "diracx:tasks:cancelled")

    again = served("cancel", queued, "--json")
    one_line(again, 1, queued, "no such task")
    assert json.loads(again.stdout) == [{"task_id": queued, "found": "unknown"}]


def test_cancel_ends_a_running_task_and_the_waiting_caller_gets_the_reason(served, server, wait_until):
    served.start("worker", "--module", "my_tasks.py").until("ready")
    begun = served.directory / "begun"
    arguments = json.dumps([str(begun), 60])
    waiting = served.start(
        "submit", "my_tasks:Slow", "--args", arguments, "--wait", "--timeout", "30", "--module", "my_tasks.py"
    )
    wait_until(begun.exists, "the task runs")
    waiting.until("\n")
    task_id = waiting.output.split()[5]
    result = served("cancel", task_id, "--json")
    assert result.returncode == 0
    assert json.loads(result.stdout) == [{"task_id": task_id, "found": "running"}]
    assert waiting.ends() == 1
    assert "TaskCancelledError" in waiting.output
    wait_until(lambda: not server.exists("diracx:tasks:cancelled"), "the mark is taken away")


def test_cancel_without_a_server_is_reported_in_one_line(cli, one_line):
    cli.environment["DIRACX_TASKS_REDIS_URL"] = "redis://:sesame@127.0.0.1:1"
    assert "sesame" not in one_line(cli("cancel", "x"), 1, "cannot reach")
    one_line(cli("cancel"), 2, "ID")
