"""Audit log of the command line."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import socket
from collections.abc import Callable

import pytest
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.plumbing.persistence import DeadLetter, TaskDB
from redis import Redis as SyncRedis
from support.command_line import Cli

ME = f"{pwd.getpwuid(os.getuid()).pw_name}@{socket.gethostname()}"


def done(cli: Cli, *args: str, code: int = 0) -> str:
    result = cli(*args)
    assert result.returncode == code, result.stderr
    return result.stdout.strip()


def test_every_action_at_the_command_line_is_in_the_audit_log_with_user_and_host(
    served: Cli, redis_url: str, initialised_task_db: str
) -> None:
    served.environment["DIRACX_DB_URL_TASKDB"] = initialised_task_db

    async def store_dead_letters() -> None:
        db = TaskDB(initialised_task_db)
        async with db.engine_context(), db:
            row = {
                "task_name": "my_tasks:Fail",
                "reason": "exhausted",
                "detail": "no",
                "data": b"no message",
            }
            for number in range(2):
                await db.insert(DeadLetter(**row, task_id=f"task-{number}", delivery_id=f"test/{number}"))

    asyncio.run(store_dead_letters())
    mine = ("--module", "my_tasks.py")
    task = done(served, "submit", "my_tasks:Greet", "--args", '["you"]', *mine).split()[-1]
    done(served, "cancel", task)
    done(served, "schedule", "pause", "my_tasks:Tick", *mine)
    done(served, "schedule", "resume", "my_tasks:Tick", *mine)
    run = done(served, "schedule", "run-now", "my_tasks:Tick", *mine)
    done(served, "schedule", "run-now", "my_tasks:Tick", *mine, code=1)
    done(served, "queue", "purge", "normal:medium", "--yes")
    with SyncRedis.from_url(redis_url) as client:
        client.set("lock:mutex:job:42", "another", px=60_000)
    done(served, "locks", "release", "lock:mutex:job:42", "--yes")
    done(served, "dlq", "retry", "1", code=1)
    done(served, "dlq", "discard", "--task", "Fail", "--yes")

    page = json.loads(done(served, "audit", "--json"))
    assert page["after"] is None
    assert {(entry["who"], entry["via"]) for entry in page["items"]} == {(ME, "cli")}
    reported = [(entry["action"], entry["target"], entry["ok"], entry["outcome"]) for entry in page["items"]]
    assert reported[::-1] == [
        ("cancel tasks", task, True, "1 queued"),
        ("pause schedules", "my_tasks:Tick", True, "1 changed"),
        ("resume schedules", "my_tasks:Tick", True, "1 changed"),
        ("run schedule now", "my_tasks:Tick", True, f"task {run}"),
        (
            *("run schedule now", "my_tasks:Tick", False),
            f"AlreadyQueuedError: the last occurrence, task {run}, still waits for a worker",
        ),
        ("purge queue", "normal:medium", True, "1 tasks removed"),
        ("release lock", "lock:mutex:job:42", True, "1 released, from another"),
        ("retry dead letters", "1", True, "0 submitted again, 1 refused"),
        ("discard dead letters", "all with task_name Fail", True, "2 discarded, 0 refused"),
    ]
    shown = served("audit", "--limit", "2")
    assert "2 discarded" in shown.stdout
    assert "purge queue" not in shown.stdout
    assert "there may be more" in shown.stderr
    older = done(served, "audit", "--limit", "1", "--after", page["items"][-2]["id"])
    assert "cancel tasks" in older


def test_reading_is_not_recorded_in_the_audit_log(served: Cli) -> None:
    done(served, "status", "--json")
    done(served, "queue", "list", "--json")
    for log in ((), ("--vo", "lhcb")):
        assert json.loads(done(served, "audit", *log, "--json")) == {"items": [], "after": None}
    assert "no action is recorded yet" in served("audit").stderr


def test_an_invalid_cursor_is_refused_in_one_line(served: Cli, one_line: Callable[..., str]) -> None:
    one_line(served("audit", "--after", "yesterday"), 2, "use the field `after`")


def test_an_action_that_cannot_be_logged_is_not_done(served: Cli, redis_url: str) -> None:
    with SyncRedis.from_url(redis_url) as client:
        client.set(keys.AUDIT, "in the way", ex=60)
        client.set("lock:mutex:job:42", "another", px=60_000)
        refused = served("locks", "release", "lock:mutex:job:42", "--yes")
        assert (refused.returncode, "replied with an error" in refused.stderr) == (1, True), refused.stderr
        assert client.get("lock:mutex:job:42") == b"another"


@pytest.mark.parametrize("problem", [None, ValueError("the action itself")])
async def test_an_action_keeps_its_result_when_its_outcome_cannot_be_logged(
    redis_url: str, caplog: pytest.LogCaptureFixture, problem: Exception | None
) -> None:
    from diracx.tasks.operations.audit import AuditLog, read_audit
    from redis.asyncio import Redis

    async with Redis.from_url(redis_url) as server:
        await server.acl_setuser("wilma", enabled=True, nopass=True, keys=["*"], categories=["+@all"])
        try:
            async with Redis.from_url(redis_url, username="wilma", password="any") as redis:

                async def do() -> str:
                    await server.acl_setuser("wilma", enabled=True, nopass=True, commands=["-xadd"])
                    if problem is not None:
                        raise problem
                    return "done"

                doing = AuditLog(redis, "wilma", "api").perform("purge queue", "normal:medium", do)
                if problem is None:
                    assert await doing == "done"
                else:
                    with pytest.raises(ValueError, match="the action itself"):
                        await doing
        finally:
            await server.acl_deluser("wilma")
        [entry] = await read_audit(server)
    assert (entry.action, entry.outcome, entry.ok) == ("purge queue", None, None)
    assert f"the outcome of entry {entry.id}" in caplog.text


@pytest.mark.parametrize("number", [1, 2, 1000])
def test_the_audit_log_names_and_counts_all_targets(number: int) -> None:
    from diracx.tasks.operations.audit import listed

    ids = [f"{each:032x}" for each in range(number)]
    text = listed(ids)
    assert all(each in text for each in ids)
    assert text.startswith(ids[0] if number == 1 else f"{number}: ")


async def test_a_long_target_is_cut_in_the_audit_log_and_marked(redis_url: str) -> None:
    from diracx.tasks.operations.audit import AuditLog, listed, read_audit
    from redis.asyncio import Redis

    async def nothing() -> str:
        return "nothing"

    ids = [f"{each:032x}" for each in range(2000)]
    async with Redis.from_url(redis_url) as redis:
        await AuditLog(redis, "wilma", "api").perform("cancel tasks", listed(ids), nothing)
        [entry] = await read_audit(redis)
    assert entry.target.startswith("2000: ")
    assert ids[1000] in entry.target
    assert ids[-1] not in entry.target
    assert entry.target.endswith(f"(the first 40000 of {len(listed(ids))} characters)")
