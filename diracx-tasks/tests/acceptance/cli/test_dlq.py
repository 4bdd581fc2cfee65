"""The command `dlq`, with real processes, server and database."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import sqlite3
import sys
from contextlib import closing

import pytest
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.plumbing.broker.models import TaskMessage
from diracx.tasks.plumbing.persistence import TaskDB
from redis import Redis
from support.broken_databases import PASSWORD
from support.command_line import COUNT_DEAD_LETTERS

FLAKY = """
from dataclasses import dataclass
from pathlib import Path
from diracx.tasks.plumbing import BaseTask, Priority, Size

@dataclass
class Flaky(BaseTask):
    path: str
    dlq_eligible = True
    priority = Priority.BACKGROUND

    async def execute(self):
        if not Path(self.path).exists():
            raise FileNotFoundError(f"{self.path} from redis://u:sesame@host/1")
        with open(self.path, "a") as out:
            out.write("ran\\n")
"""
STREAM = "diracx:tasks:background:medium"


@pytest.fixture
def dlq(served, tmp_path, initialised_task_db):
    """The command line with a database of dead letters, and the tasks of `flaky.py`."""
    served.environment["DIRACX_DB_URL_TASKDB"] = initialised_task_db
    (tmp_path / "flaky.py").write_text(FLAKY)
    return served


def store_dead_letters(cli, number: int = 1, *, first: int = 0, **changes) -> None:
    """Put dead letters of Flaky into the database, as a worker would."""
    from diracx.tasks.plumbing.persistence import DeadLetter, TaskDB

    async def store() -> None:
        db = TaskDB(cli.environment["DIRACX_DB_URL_TASKDB"])
        async with db.engine_context(), db:
            for each in range(first, first + number):
                message = TaskMessage(task_id=f"task-{each}", task_name="flaky:Flaky", task_args=["there"])
                values = {"reason": "exhausted", "detail": "no", "data": message.dumpb(), **changes}
                named = {"task_id": message.task_id, "task_name": message.task_name}
                await db.insert(DeadLetter(**{**named, **values}, delivery_id=f"{STREAM}/{each}"))

    asyncio.run(store())


def statuses(cli) -> list[str]:
    with database_of(cli) as connection:
        return [row[0] for row in connection.execute("SELECT Status FROM DeadLetters ORDER BY ID")]


def listed(cli, *args: str) -> list[dict]:
    return json.loads(cli("dlq", "list", "--json", *args).stdout)


def retry(cli, *args: str):
    return cli("dlq", "retry", *args, "--module", "flaky.py")


def test_P34_a_dead_letter_is_listed_shown_submitted_again_and_runs(dlq, redis_url, tmp_path, wait_until):
    worker = dlq.start("worker", "--module", "flaky.py")
    worker.until("ready")
    file = tmp_path / "there"
    args = json.dumps([str(file)])
    task_id = dlq("submit", "flaky:Flaky", "--args", args, "--module", "flaky.py").stdout.split()[-1]
    wait_until(lambda: listed(dlq), "the dead letter is there")

    [row] = listed(dlq, "--task", "Flaky", "--reason", "exhausted", "--since", "1h")
    assert (row["task_id"], row["task_name"], row["status"]) == (
        task_id,
        "flaky:Flaky",
        "PENDING",
    )
    assert row["failed_attempts"] == 1
    table = dlq("dlq", "list").stdout
    assert task_id in table
    assert "sesame" not in table
    page = dlq("dlq", "show", str(row["id"])).stdout
    for text in (task_id, "FileNotFoundError", "Traceback", str(file), "exhausted"):
        assert text in page
    assert "sesame" not in page
    shown = json.loads(dlq("dlq", "show", task_id, "--json").stdout)
    assert shown["message"]["task_args"] == [str(file)]
    assert shown["attempts"][0]["type"] == "FileNotFoundError"

    file.touch()
    ended = retry(dlq, task_id)
    assert ended.stdout == "1 submitted again\n", ended.stderr
    wait_until(lambda: file.read_text() == "ran\n", "the task runs again")
    assert listed(dlq) == []
    [row] = listed(dlq, "--status", "any")
    assert row["status"] == "RESUBMITTED"
    again = retry(dlq, task_id)
    assert (again.returncode, again.stdout) == (0, "0 submitted again, 1 had been already\n")

    # It fails once more: the same dead letter, with all that was before.
    file.unlink()
    message = TaskMessage(task_id=task_id, task_name="flaky:Flaky", task_args=[str(file)])
    with Redis.from_url(redis_url) as redis:
        redis.xadd(STREAM, {"data": message.dumpb()})
    wait_until(lambda: listed(dlq), "it is there again")
    [row] = listed(dlq)
    assert (row["task_id"], row["earlier_burials"]) == (task_id, 1)
    assert "earlier failure 1" in dlq("dlq", "show", task_id).stdout
    file.touch()
    assert json.loads(retry(dlq, "--all", "--yes", "--json").stdout)["resubmitted"] == [
        {"id": row["id"], "task_id": task_id}
    ]
    wait_until(lambda: file.read_text() == "ran\n", "the task runs again")


@pytest.mark.leaves_keys(STREAM)
def test_P34_two_concurrent_operators_resubmit_each_dead_letter_once(dlq, redis_url):
    store_dead_letters(dlq, 150)
    running = [dlq.start("dlq", "retry", "--all", "--yes", "--json", "--module", "flaky.py") for _ in range(3)]
    assert [process.ends() for process in running] == [0, 0, 0], [process.output for process in running]
    assert sum(len(json.loads(process.output)["resubmitted"]) for process in running) == 150
    with Redis.from_url(redis_url) as redis:
        ids = [TaskMessage.loadb(fields[b"data"]).task_id for _, fields in redis.xrange(STREAM)]
    assert sorted(ids) == sorted(f"task-{number}" for number in range(150))
    assert set(statuses(dlq)) == {"RESUBMITTED"}


def database_of(cli):
    path = cli.environment["DIRACX_DB_URL_TASKDB"].partition(":///")[2]
    return closing(sqlite3.connect(path, isolation_level=None))


def retry_that_cannot_submit(cli, redis, database, wait_until):
    """A retry that is in the audit log and has marked its dead letters, and whose submission waits."""
    database.execute("BEGIN IMMEDIATE")  # the mark must wait for us
    retrying = cli.start("dlq", "retry", "--all", "--yes", "--module", "flaky.py")
    wait_until(lambda: redis.xlen(keys.AUDIT), "it is written down")
    redis.client_pause(30_000, all=False)  # writes wait
    database.execute("ROLLBACK")
    wait_until(lambda: statuses(cli) == ["RESUBMITTING"] * 3, "the mark in SQL")
    return retrying


@pytest.mark.leaves_keys(STREAM)
def test_P34_a_retry_killed_before_the_submission_is_finished_by_the_next(dlq, redis_url, wait_until):
    store_dead_letters(dlq, 3)
    with Redis.from_url(redis_url) as redis, database_of(dlq) as database:
        killed = retry_that_cannot_submit(dlq, redis, database, wait_until)
        killed.process.send_signal(signal.SIGKILL)
        killed.process.wait()
        redis.client_unpause()
        assert listed(dlq)[0]["status"] == "RESUBMITTING"
        assert retry(dlq, "--all", "--yes").returncode == 0
        assert redis.xlen(STREAM) == 3
    assert statuses(dlq) == ["RESUBMITTED"] * 3


@pytest.mark.leaves_keys(STREAM)
def test_P34_a_retry_killed_after_the_submission_is_not_submitted_again(dlq, redis_url, wait_until):
    store_dead_letters(dlq, 3)
    with Redis.from_url(redis_url) as redis, database_of(dlq) as database:
        killed = retry_that_cannot_submit(dlq, redis, database, wait_until)
        database.execute("BEGIN IMMEDIATE")  # the last step of the retry must wait for us
        redis.client_unpause()
        wait_until(lambda: redis.xlen(STREAM) == 3, "the submission")
        killed.process.send_signal(signal.SIGKILL)
        killed.process.wait()
        database.execute("ROLLBACK")
        assert statuses(dlq) == ["RESUBMITTING"] * 3
        report = json.loads(retry(dlq, "--all", "--yes", "--json").stdout)
        assert (len(report["resubmitted"]), len(report["already"])) == (0, 3)
        assert redis.xlen(STREAM) == 3
    assert statuses(dlq) == ["RESUBMITTED"] * 3


@pytest.mark.leaves_keys(STREAM)
def test_P34_the_scheduler_resubmits_dead_letters_at_its_start_if_configured(dlq, redis_url, wait_until):
    store_dead_letters(dlq, 2)
    store_dead_letters(dlq, first=2, reason="poison")
    store_dead_letters(dlq, first=3, data=TaskMessage(task_id="task-3", task_name="flaky:Gone").dumpb())
    plain = dlq.start("scheduler", "--module", "flaky.py")
    plain.until("leading")
    scheduler = dlq.start("scheduler", "--module", "flaky.py", "--resubmit-dead-letters")
    scheduler.until("dead letters: 2 submitted again, 1 refused")
    assert "'flaky:Gone'" in scheduler.output
    with Redis.from_url(redis_url) as redis:
        assert redis.xlen(STREAM) == 2
    assert statuses(dlq) == ["RESUBMITTED", "RESUBMITTED", "PENDING", "PENDING"]
    for process in (plain, scheduler):
        process.process.terminate()
        assert process.ends() == 0, process.output


def test_the_scheduler_requires_the_database_of_dead_letters_to_resubmit(served, one_line):
    one_line(served("scheduler", "--resubmit-dead-letters"), 1, "DIRACX_DB_URL_TASKDB")


@pytest.mark.leaves_keys(STREAM)
def test_P34_a_dead_letter_that_cannot_be_submitted_is_an_error_of_one_line(dlq, redis_url, one_line):
    store_dead_letters(dlq, data=b"\0garbage", reason="unparsable")
    store_dead_letters(dlq, first=1, data=TaskMessage(task_id="task-1", task_name="flaky:Flakey").dumpb())
    store_dead_letters(dlq, first=2, data=TaskMessage(task_id="task-2", task_name="flaky:Flaky").dumpb())
    store_dead_letters(dlq, first=3)
    one_line(retry(dlq, "task-0"), 1, "dead letter 1 (task-0)", "cannot be decoded")
    one_line(retry(dlq, "2"), 1, "'flaky:Flakey'", "--module")
    one_line(retry(dlq, "3"), 1, "does not accept its arguments", "path")
    one_line(dlq("dlq", "retry", "4"), 1, "no task is registered as 'flaky:Flaky'")
    some = retry(dlq, "--all", "--yes")
    assert (some.returncode, some.stdout) == (1, "1 submitted again\n")
    assert some.stderr.splitlines()[-1] == "error: 3 dead letters were not submitted again"
    assert len(some.stderr.splitlines()) == 4
    with Redis.from_url(redis_url) as redis:
        assert redis.xlen(STREAM) == 1


def test_discarded_dead_letters_stay_discarded(dlq, one_line):
    store_dead_letters(dlq, 3)
    assert dlq("dlq", "discard", "task-0").stdout == "1 discarded\n"
    assert dlq("dlq", "discard", "1").stdout == "1 discarded\n", "safe to repeat"
    one_line(retry(dlq, "1"), 1, "discarded")
    report = json.loads(dlq("dlq", "discard", "--task", "Flaky", "--limit", "1", "--yes", "--json").stdout)
    assert report == {"discarded": [{"id": 2, "task_id": "task-1"}], "refused": []}
    assert statuses(dlq) == ["DISCARDED", "DISCARDED", "PENDING"]
    assert [row["id"] for row in listed(dlq, "--status", "discarded")] == [1, 2]


def test_dlq_export_writes_every_dead_letter_completely(dlq):
    data = TaskMessage(task_id="task-0", task_name="flaky:Flaky", task_args=[{1, 2}, b"\xff"]).dumpb()
    store_dead_letters(dlq, data=data, attempts=[{"type": "E", "message": "m", "traceback": "t"}])
    store_dead_letters(dlq, first=1, data=b"\xc1\0garbage", reason="unparsable", task_name="")
    exported = [json.loads(line) for line in dlq("dlq", "export").stdout.splitlines()]
    assert exported == [json.loads(line) for line in dlq("dlq", "export", "--json").stdout.splitlines()]
    assert base64.b64decode(exported[0]["raw"]) == data
    assert exported[0]["message"]["task_args"] == [[1, 2], "_w=="]
    assert exported[0]["attempts"] == [{"type": "E", "message": "m", "traceback": "t"}]
    assert exported[1]["message"] is None
    assert base64.b64decode(exported[1]["raw"]) == b"\xc1\0garbage"
    assert len(dlq("dlq", "export", "--reason", "UNPARSABLE").stdout.splitlines()) == 1


def test_an_export_into_a_closed_pipe_ends_quietly(dlq):
    store_dead_letters(dlq, 300, data=b"\xc1" * 10_000)
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as head, (dlq.directory / "errors").open("w+b") as errors:
        with os.fdopen(writer, "wb") as stdout:
            process = dlq.commands.start(
                ["diracx-task-run", "dlq", "export"], env=dlq.environment, stdout=stdout, stderr=errors
            )
        assert json.loads(head.readline())
        head.close()
        assert process.wait(60) == 0
        assert errors.read() == b""


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["list", "--since", "yesterday"], ["--since 'yesterday'", "24h"]),
        (["list", "--since", "1h", "--before", "2h"], ["--since 1h", "--before 2h"]),
        (["list", "--reason", "tired"], ["tired", "exhausted"]),
        (["list", "--status", "gone"], ["gone", "open"]),
        (["list", "--limit", "0"], ["0"]),
        (["list", "--task", ""], ["--task"]),
        (["export", "--before", "2030-13-01"], ["2030-13-01"]),
        (["show"], ["ID"]),
        (["retry"], ["--all"]),
        (["retry", "--limit", "3"], ["--all"]),
        (["retry", "7", "--all"], ["ids and filters"]),
        (["discard", "7", "--task", "Flaky"], ["ids and filters"]),
        (["retry", "--all"], ["--yes", "Submit 1 dead letters again?"]),
        (["discard", "--all"], ["--yes", "Discard 1 dead letters?"]),
        (["discrad"], ["discrad"]),
    ],
)
def test_contradictory_options_are_one_line_and_exit_code_2(dlq, one_line, args, said):
    store_dead_letters(dlq)
    one_line(dlq("dlq", *args), 2, *said)
    assert statuses(dlq) == ["PENDING"]


@pytest.mark.parametrize("command", ["show", "retry", "discard"])
def test_an_unknown_dead_letter_is_reported_in_one_line(dlq, one_line, command):
    one_line(dlq("dlq", command, "17"), 1, "no dead letter '17'", "dlq list")


def test_dlq_without_a_command_prints_its_help(dlq):
    ended = dlq("dlq")
    assert ended.returncode == 2
    for command in ("list", "show", "retry", "discard", "export", "init"):
        assert command in ended.stdout


def test_a_refused_confirmation_changes_nothing(dlq):
    store_dead_letters(dlq, 2)
    for answer, code, after in (("n", 1, "PENDING"), ("y", 0, "DISCARDED")):
        discarded = dlq("dlq", "discard", "--all", typed=f"{answer}\n", terminal=True)
        assert discarded.returncode == code, discarded.stderr
        assert "Discard 2 dead letters?" in discarded.stderr
        assert statuses(dlq) == [after] * 2


@pytest.mark.parametrize("command", [["list"], ["show", "1"], ["retry", "1"], ["discard", "1"], ["export"]])
def test_a_database_that_is_missing_empty_or_down_is_reported_in_one_line(served, one_line, tmp_path, command):
    one_line(served("dlq", *command), 1, "DIRACX_DB_URL_TASKDB")
    served.environment["DIRACX_DB_URL_TASKDB"] = f"sqlite+aiosqlite:///{tmp_path}/empty.db"
    one_line(served("dlq", *command), 1, "TaskDB is not initialised", "dlq init")
    served.environment["DIRACX_DB_URL_TASKDB"] = "mysql+aiomysql://u:sesame@127.0.0.1:1/tasks"
    assert "sesame" not in one_line(served("dlq", *command), 1, "cannot reach the database TaskDB")
    served.environment["DIRACX_DB_URL_TASKDB"] = "mysql://u:sesame@127.0.0.1:1/tasks"
    assert "sesame" not in one_line(served("dlq", *command), 1, "not a valid database URL")


COMMANDS = (
    *("dlq list", "dlq show 1", "dlq retry 1", "dlq discard 1", "dlq export", "dlq init"),
    *("db current", "db upgrade", "db downgrade base --yes", "worker --worker-size small"),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_reports_a_missing_database_in_one_line(served, one_line, tmp_path, command):
    (tmp_path / "another").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    served.environment["DIRACX_DB_URL_TASKDB"] = f"sqlite+aiosqlite:///{tmp_path}/another"
    one_line(served(*command.split()), 1, "is not an SQLite database", "DIRACX_DB_URL_TASKDB")


def test_every_database_error_is_reported_in_one_line(served, one_line, troubled_database):
    troubled = asyncio.run(troubled_database(TaskDB.migrations))
    served.environment["DIRACX_DB_URL_TASKDB"] = troubled.url
    for command in ("dlq list", "db current", "dlq init", "db upgrade"):
        response = served(*command.split())
        if command != "dlq list" and response.returncode == 0:
            continue  # it repairs this one, or has nothing to do once it is repaired
        assert PASSWORD not in one_line(response, 1, *troubled.says)


def test_a_table_of_another_version_is_named(served, one_line, tmp_path):
    path = tmp_path / "old.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE DeadLetters (ID INTEGER PRIMARY KEY, TaskID TEXT)")
    served.environment["DIRACX_DB_URL_TASKDB"] = f"sqlite+aiosqlite:///{path}"
    one_line(served("dlq", "list"), 1, "no column", "Burial in DeadLetters", "diracx-task-run db upgrade")


def test_a_broker_outage_leaves_dead_letters_as_they_were(dlq, one_line):
    store_dead_letters(dlq)
    dlq.environment["DIRACX_TASKS_REDIS_URL"] = "redis://127.0.0.1:1"
    one_line(retry(dlq, "1"), 1, "cannot reach Redis")
    assert statuses(dlq) == ["PENDING"]


@pytest.mark.leaves_keys(STREAM)
@pytest.mark.parametrize("kind", ["mariadb", "postgresql"])
async def test_P34_dead_letters_in_a_database_server(served, tmp_path, redis_url, kind, empty_database):
    (tmp_path / "flaky.py").write_text(FLAKY)
    served.environment["DIRACX_DB_URL_TASKDB"] = await empty_database(kind)
    assert served("dlq", "init").stdout == "created the table DeadLetters\n"
    assert served("dlq", "init").stdout == "the table DeadLetters exists\n", "safe to repeat"
    await asyncio.to_thread(store_dead_letters, served, 2)
    assert [row["task_id"] for row in listed(served, "--since", "1h")] == ["task-0", "task-1"]
    assert retry(served, "--all", "--yes").stdout == "2 submitted again\n"
    # A worker whose tasks want that database takes it as well.
    served.add_tasks(COUNT_DEAD_LETTERS)
    assert served.mine("call", "my_tasks:CountDeadLetters").stdout == "Result: 0\n"
    served.start("worker", "--module", "my_tasks.py").until("ready")
    with Redis.from_url(redis_url) as redis:
        assert redis.exists(f"{keys.RESUBMITTED_PREFIX}task-0@{STREAM}/0")


async def test_P12_a_dead_letter_survives_a_database_outage(
    served, tmp_path, redis_url, wait_until, empty_database, mariadb_server, stoppable
):
    server = stoppable(mariadb_server)
    (tmp_path / "flaky.py").write_text(FLAKY)
    served.environment["DIRACX_DB_URL_TASKDB"] = await empty_database("mariadb")
    served("dlq", "init")
    worker = served.start("worker", "--module", "flaky.py", "--module", "my_tasks.py")
    worker.until("ready")
    server.kill()
    task_id = served("submit", "flaky:Flaky", "--args", '["x"]', "--module", "flaky.py").stdout.split()[-1]
    worker.until("cannot store a dead letter")
    assert "Hello you" in served.mine("submit", "my_tasks:Greet", "--args", '["you"]', "--wait").stdout
    down = served("dlq", "list")
    assert (down.returncode, len(down.stderr.splitlines())) == (1, 1), down.stderr
    with Redis.from_url(redis_url) as redis:
        assert redis.xlen(STREAM) == 1
        server.start()
        worker.until("can store a dead letter again")
        wait_until(lambda: redis.xlen(STREAM) == 0, "acknowledged")
    assert [row["task_id"] for row in listed(served)] == [task_id]
    assert "Traceback" not in worker.output.partition("cannot store")[2]


@pytest.mark.parametrize(
    ("package", "extra", "url", "args"),
    [
        ("alembic", "migrations", "sqlite+aiosqlite:///dead.db", ["db", "current"]),
        ("alembic", "migrations", "sqlite+aiosqlite:///dead.db", ["db", "upgrade"]),
        ("asyncpg", "postgresql", f"postgresql+asyncpg://tasks:{PASSWORD}@db.example/tasks", ["db", "current"]),
        ("asyncpg", "postgresql", f"postgresql+asyncpg://tasks:{PASSWORD}@db.example/tasks", ["dlq", "list"]),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_its_extra(served, one_line, package, extra, url, args):
    served.environment["DIRACX_DB_URL_TASKDB"] = url
    program = f"import sys; sys.modules[{package!r}] = None\nfrom diracx.tasks.cli import main; main()"
    result = served(*args, program=(sys.executable, "-c", program))
    assert PASSWORD not in one_line(result, 1, f"pip install 'diracx-tasks[{extra}]'")


def test_db_upgrade_recognises_tables_without_a_version(served, one_line, initialised_task_db):
    served.environment["DIRACX_DB_URL_TASKDB"] = initialised_task_db
    current = json.loads(served("db", "current", "--json").stdout)
    assert (current["revision"], current["stamped"], current["pending"]) == (current["head"], False, [])
    up = json.loads(served("db", "upgrade", "--json").stdout)
    assert (up["recognised"], up["after"], up["steps"]) == (True, current["head"], [])
    assert served("db", "current", "--check").stdout == f"TaskDB is at {up['after']}, needed: {up['after']}\n"
    one_line(served("db", "downgrade", "base"), 2, "--yes")
    one_line(served("db", "upgrade", "7"), 1, "no revision '7'")
    assert "0001 Create the table of dead letters" in served("db", "downgrade", "base", "--yes").stdout
    assert served("db", "current", "--check").returncode == 1
    assert served("db", "upgrade").returncode == 0
    assert served("dlq", "list").returncode == 0


@pytest.mark.parametrize("away", [False, True], ids=["database up", "database away"])
async def test_P12_a_killed_worker_loses_no_dead_letter_and_doubles_none(
    served, tmp_path, redis_url, wait_until, empty_database, mariadb_server, stoppable, away
):
    server = stoppable(mariadb_server)
    (tmp_path / "flaky.py").write_text(FLAKY)
    served.environment["DIRACX_DB_URL_TASKDB"] = url = await empty_database("mariadb")
    served("dlq", "init")
    arguments = ("worker", "--module", "flaky.py", "--lease-seconds", "2", "--max-concurrent-tasks", "500")
    worker = served.start(*arguments)
    worker.until("ready")
    if away:
        server.kill()
    ids = {f"task-{number}" for number in range(1500)}
    messages = [TaskMessage(task_id=each, task_name="flaky:Flaky", task_args=["there"]) for each in ids]
    with Redis.from_url(redis_url) as redis:
        for message in messages:
            redis.xadd(STREAM, {"data": message.dumpb()})
        if away:
            wait_until(lambda: redis.xlen(keys.DEAD_LETTERS) > 0, "what is too much goes to Redis")
        else:
            wait_until(lambda: redis.xlen(STREAM) < 1500, "the first are stored")
        worker.process.kill()
        server.start()
        served.start(*arguments)
        wait_until(lambda: redis.xlen(STREAM) == redis.xlen(keys.DEAD_LETTERS) == 0, "all are stored")
    db = TaskDB(url)
    async with db.engine_context():
        rows = await db.summaries(limit=10_000)
    assert {row["task_id"] for row in rows} == ids
    assert len(rows) == len(ids)
    assert all(row["earlier_burials"] == 0 for row in rows)
