"""Untrusted names, ids and errors in the output of all commands."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta

import pytest
from diracx.tasks.plumbing.broker import RedisStreamBroker
from diracx.tasks.plumbing.broker.groups import list_groups
from diracx.tasks.plumbing.broker.models import Submission, TaskMessage
from diracx.tasks.plumbing.persistence import DeadLetter, TaskDB
from support.command_line import Cli

NASTY = "id\x1b]0;x\x07\x1b[31m\x9b2J\u202e\r\nFORGED [red]x[/red] [/] [link=http://x]y[/link]"
STREAM = "diracx:tasks:normal:medium"


async def fill(redis_url: str, database: str) -> None:
    """Put hostile text into every field that users or other systems can set."""
    attempts = [{"type": NASTY, "message": NASTY, "traceback": NASTY, "host": NASTY, "started": NASTY}]
    message = TaskMessage(task_id=NASTY, task_name=NASTY, task_args=[NASTY], labels={NASTY: NASTY})
    broker = RedisStreamBroker(redis_url)
    await broker.submit([Submission(message, STREAM)])
    await broker.submit([Submission(message, STREAM, datetime.now(UTC) + timedelta(hours=1))])
    child = Submission(TaskMessage(task_id=f"{NASTY}2", task_name=NASTY), STREAM)
    group = {"total": 1, "callback": b"", "callback_name": NASTY, "callback_stream": STREAM, "failure_name": NASTY}
    await broker.submit_group(NASTY, [child], group, 600)
    assert await list_groups(broker.redis)
    await broker.redis.set(f"lock:mutex:task:{NASTY}".encode(errors="surrogatepass"), NASTY, px=600_000)
    await broker.shutdown()
    db = TaskDB(database)
    async with db.engine_context(), db:
        message.labels["attempts"] = attempts
        await db.insert(DeadLetter.of_message(message, "exhausted", NASTY, NASTY))
        raw = DeadLetter(
            task_id=f"{NASTY}3", task_name="", reason="unparsable", detail=NASTY, data=b"\x1b", delivery_id="b"
        )
        await db.insert(raw)


@pytest.mark.leaves_keys("diracx:tasks:*", "lock:*")
def test_no_command_prints_control_characters_or_forged_lines(
    served: Cli, redis_url: str, initialised_task_db: str
) -> None:
    served.environment |= {"DIRACX_DB_URL_TASKDB": initialised_task_db, "COLUMNS": "400"}
    asyncio.run(fill(redis_url, initialised_task_db))
    for command in (
        ["status"],
        ["queue", "list"],
        ["queue", "peek", "normal:medium"],
        ["queue", "peek", NASTY.replace("\0", "")],
        ["queue", "delayed"],
        ["group", "list"],
        ["group", "show", NASTY],
        ["group", "show", "no" + NASTY],
        ["locks", "list"],
        ["locks", "show", f"lock:mutex:task:{NASTY}"],
        ["dlq", "list"],
        ["dlq", "show", "1"],
        ["dlq", "show", "2"],
        ["dlq", "retry", NASTY],
        ["dlq", "discard", "--task", NASTY],
        ["cancel", NASTY],
        ["audit"],
        ["submit", NASTY],
        ["schedule", "run", NASTY],
        [NASTY],
    ):
        ended = served(*command)
        reported = ended.stdout + ended.stderr
        assert "Traceback (most recent call last)" not in reported, reported
        assert reported.replace("\n", "").isprintable(), (command, reported)
        assert not [line for line in reported.splitlines() if line.startswith("FORGED")], (command, reported)


@pytest.mark.leaves_keys("diracx:tasks:*", "lock:*")
def test_json_output_keeps_every_character(served: Cli, redis_url: str, initialised_task_db: str) -> None:
    served.environment["DIRACX_DB_URL_TASKDB"] = initialised_task_db
    asyncio.run(fill(redis_url, initialised_task_db))
    ended = served("dlq", "show", "1", "--json")
    assert ended.stdout.replace("\n", "").isprintable()
    assert json.loads(ended.stdout)["message"]["task_args"] == [NASTY]


def test_a_result_is_printed_readably_or_complete_as_json(served: Cli) -> None:
    args = ["--args", json.dumps([NASTY])]
    plain = served.mine("call", "my_tasks:Greet", *args)
    assert "FORGED [red]x[/red]" in plain.stdout
    assert plain.stdout.replace("\n", "").isprintable()
    assert json.loads(served.mine("call", "my_tasks:Greet", *args, "--json").stdout) == f"Hello {NASTY}"
