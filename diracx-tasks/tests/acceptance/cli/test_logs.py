"""Logs of real processes: `DIRACX_LOG_...`, and the task of each record."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from diracx.tasks.plumbing.broker.models import TaskMessage
from redis import Redis
from support.command_line import Cli

_TALK = """
import asyncio
import logging
import threading
import warnings

from diracx.tasks.plumbing import BaseTask, ExponentialBackoff


class Talk(BaseTask):
    retry_policy = ExponentialBackoff(base_delay_seconds=0, max_retries=1)

    async def execute(self):
        logging.getLogger("diracx.mine").debug("said by diracx")
        logging.getLogger(__name__).debug("said by the task")
        logging.getLogger("some.library").info("said by a library")
        await asyncio.to_thread(logging.getLogger(__name__).info, "said in a thread")
        await asyncio.create_task(self._log())
        warnings.warn("said by Python")
        raise ValueError("broken by redis://u:sesame@host\\n2026-11-28T12:00:00.000Z ERROR forged")

    async def _log(self):
        logging.getLogger("some.library").error("an error\\u2028in redis://u:sesame@host", extra={"file": "f"})
"""


@pytest.fixture
def talking(served: Cli) -> Cli:
    (served.directory / "talk.py").write_text(_TALK)
    return served


def submit(served: Cli, name: str) -> str:
    done = served("submit", name, "--module", "talk.py", "--json")
    assert done.returncode == 0, done.stderr
    task_id: str = json.loads(done.stdout)["task_id"]
    return task_id


@pytest.mark.leaves_keys("diracx:tasks:dead-letters")  # of the unknown task
def test_every_line_is_json_and_has_the_task_that_caused_it(talking: Cli, redis_url: str) -> None:
    talking.environment |= {"DIRACX_LOG_FORMAT": "json", "DIRACX_LOG_LIBRARIES_LEVEL": "info"}
    worker = talking.start("worker", "--module", "talk.py", "--log-level", "debug")
    worker.until("ready")
    task_id = submit(talking, "talk:Talk")
    with Redis.from_url(redis_url) as client:
        unknown = TaskMessage(task_id="u", task_name="talk:Unknown")
        client.xadd("diracx:tasks:normal:medium", {"data": unknown.dumpb()})
    worker.until("failed permanently")
    worker.until("no task is registered")
    assert "sesame" not in worker.output
    records: list[dict[str, Any]] = [json.loads(line) for line in worker.output.splitlines()]
    for record in records:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record["timestamp"])
        assert record["severity_text"] in ("DEBUG", "INFO", "WARNING", "ERROR")
        assert record["logger"]
    for message, logger in (
        ("said by diracx", "diracx.mine"),
        ("said by the task", "talk"),
        ("said by a library", "some.library"),
        ("said in a thread", "talk"),
        ("said by Python", "py.warnings"),
        ("an error", "some.library"),
        ("failed, to be retried", "diracx.tasks.plumbing.worker.settlement"),
        ("failed permanently", "diracx.tasks.plumbing.worker.settlement"),
    ):
        found = [record for record in records if message in record["body"] and "ready" not in record["body"]]
        assert found, message
        for record in found:
            assert (record["logger"], record["task.name"], record["task.id"]) == (logger, "talk:Talk", task_id)
    assert [record["task.id"] for record in records if "no task is registered" in record["body"]] == ["u"]
    assert "task.id" not in next(record for record in records if record["body"].startswith("ready"))
    assert {record.get("file") for record in records} == {None, "f"}


@pytest.mark.parametrize(
    ("variables", "options", "seen"),
    [
        ({}, [], {"thread"}),
        ({"LEVEL": "debug"}, [], {"diracx", "task", "thread"}),
        ({"LEVEL": "WARNING"}, [], set()),
        ({"LEVEL": "warning"}, ["--log-level", "info"], {"thread"}),
        ({"LIBRARIES_LEVEL": "INFO"}, [], {"thread", "library"}),
        ({"LIBRARIES_LEVEL": "INFO"}, ["--log-level", "error"], {"library"}),
    ],
)
def test_levels_are_those_of_the_option_else_of_the_environment(
    talking: Cli, variables: dict[str, str], options: list[str], seen: set[str]
) -> None:
    talking.environment |= {f"DIRACX_LOG_{name}": value for name, value in variables.items()}
    worker = talking.start("worker", "--module", "talk.py", *options)
    submit(talking, "talk:Talk")
    worker.until("failed permanently")
    marks = {"diracx": "by diracx", "task": "by the task", "thread": "in a thread", "library": "by a library"}
    assert {name for name, mark in marks.items() if f"said {mark}" in worker.output} == seen


def test_text_has_time_level_logger_and_task_and_nothing_forged_begins_a_line(talking: Cli) -> None:
    worker = talking.start("worker", "--module", "talk.py")
    task_id = submit(talking, "talk:Talk")
    worker.until("failed permanently")
    lines = worker.output.splitlines()
    moment = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ([A-Z]+) +[a-z_.]+: ")
    assert all(moment.match(line) or line.startswith("  ") for line in lines), worker.output
    [message, _] = [line for line in lines if "said in a thread" in line]
    assert moment.sub("", message) == f"said in a thread [task.name=talk:Talk task.id={task_id}]"
    assert "sesame" not in worker.output


@pytest.mark.parametrize("command", ["worker", "scheduler", "call", "dashboard"])
@pytest.mark.parametrize("variable", ["FORMAT", "LEVEL", "LIBRARIES_LEVEL"])
def test_a_format_or_level_that_does_not_exist_is_reported_in_one_line(
    talking: Cli, one_line: Callable[..., str], command: str, variable: str
) -> None:
    talking.environment[f"DIRACX_LOG_{variable}"] = "loud"
    arguments = ["call", "talk:Talk"] if command == "call" else [command]
    one_line(talking(*arguments, "--module", "talk.py"), 1, f"DIRACX_LOG_{variable}", "'loud'", "unset")
