"""Inspection of worker processes from the command line."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from diracx.tasks.plumbing.broker.streams import ALL_STREAM_NAMES
from redis import Redis as SyncRedis
from support.command_line import Cli

HOLD = """

@dataclass
class Hold(BaseTask):
    name: str
    password: str
    begun: str
    secret_fields = frozenset({"password"})

    @property
    def execution_locks(self):
        return [MutexLock(TASK, self.name)]

    async def execute(self):
        Path(self.begun).touch()
        await asyncio.sleep(600)
"""


@pytest.fixture
def holding(served: Cli) -> Cli:
    """With a task that holds a lock until it is stopped."""
    with (served.directory / "my_tasks.py").open("a") as tasks:
        tasks.write(HOLD)
    return served


def hold(cli: Cli, name: str) -> str:
    args = json.dumps([name, "sesame", str(cli.directory / f"begun-{name}")])
    return cli.mine("submit", "my_tasks:Hold", "--args", args).stdout.split()[-1]


def shown(result: subprocess.CompletedProcess[str]) -> Any:
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_an_empty_system_is_shown_as_healthy(served: Cli) -> None:
    status = served("status")
    assert "no alerts" in status.stdout
    assert "realtime:small" in status.stdout
    seen = shown(served("status", "--json"))
    assert (seen["alerts"], seen["severity"], seen["workers"], len(seen["queues"])) == ([], "ok", [], 9)
    assert len(shown(served("queue", "list", "--json"))) == 9
    assert shown(served("workers", "--json")) == []
    assert shown(served("running", "--json")) == {"items": [], "after": None}
    assert shown(served("locks", "list", "--json")) == {"items": [], "after": None}
    assert shown(served("tasks", "stats", "--json")) == {"stats": [], "failures": []}


@pytest.mark.leaves_keys("diracx:*")
def test_check_has_exit_codes_of_nagios_and_prints_the_errors(
    served: Cli, redis_url: str, initialised_task_db: str
) -> None:
    def checked(code: int, *said: str) -> None:
        result = served("status", "--check")
        assert (result.returncode, result.stderr) == (code, ""), result.stdout
        for text in said:
            assert text in result.stdout

    served.environment["DIRACX_DB_URL_TASKDB"] = initialised_task_db
    checked(0, "OK - no alerts, but not all checks ran", "not checked: compute elements and pilots")
    served.environment["DIRACX_DB_URL_TASKDB"] = f"sqlite+aiosqlite:///{served.directory}/none/task.db"
    checked(3, "UNKNOWN - the database of dead letters cannot be checked")
    served.environment["DIRACX_DB_URL_TASKDB"] = initialised_task_db
    with SyncRedis.from_url(redis_url) as redis:
        redis.xadd("diracx:tasks:dead-letters", {"data": b"x"})
        checked(1, "WARNING - 1 dead letter waits in Redis")
        served.mine("submit", "my_tasks:Greet", "--args", '["Ada"]')
        checked(
            2, "CRITICAL - normal:medium: 1 task waits, and no worker", "(and 1 more)", "WARNING: 1 dead letter"
        )
        seen = json.loads(served("status", "--check", "--json").stdout)
        assert [alert["check"] for alert in seen["alerts"]] == ["queue_without_worker", "dead_letters_waiting"]
        assert all(alert["since"] and alert["remedy"] for alert in seen["alerts"])
    served.environment["DIRACX_TASKS_REDIS_URL"] = "redis://127.0.0.1:1"
    checked(2, "CRITICAL - Redis does not respond", "server: redis://127.0.0.1:1")
    served.environment["DIRACX_TASKS_REDIS_URL"] = "http://127.0.0.1:1"
    checked(3, "UNKNOWN - ")
    served.environment["DIRACX_TASKS_REDIS_URL"] = redis_url
    served.environment["DIRACX_TASKS_HEALTH_WAIT_SECONDS"] = "long"
    checked(3, "UNKNOWN - DIRACX_TASKS_HEALTH_WAIT_SECONDS='long'")


@pytest.mark.leaves_keys("diracx:*")
def test_inspect_accepts_the_short_name_of_a_class(served: Cli, wait_until: Callable[..., None]) -> None:
    served.start("worker", "--module", "my_tasks.py").until("ready")
    served.mine("submit", "my_tasks:Fail", "--wait")
    name = "my_tasks:Fail"

    def counted() -> bool:
        reported = shown(served("tasks", "stats", "--json"))
        return [each["task_name"] for each in reported["stats"]] == [name]

    wait_until(counted, "it is counted")
    reported = shown(served("tasks", "stats", "--task", "Fail", "--failures", "3", "--json"))
    assert [each["failed"] for each in reported["stats"]] == [1]
    assert [each["task_name"] for each in reported["failures"]] == [name]
    unknown = served("tasks", "stats", "--task", "Fial", "--module", "my_tasks.py")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert "unknown task 'Fial'; did you mean 'my_tasks:Fail'?" in unknown.stderr


def test_watch_repeats_the_output(served: Cli, wait_until: Callable[..., None]) -> None:
    watching = served.start("status", "--watch", "--every", "0.2", "--json")
    wait_until(lambda: watching.output.count("\n") >= 2, "two lines")
    lines = [json.loads(line) for line in watching.output.splitlines()[:2]]
    assert lines[0]["at"] < lines[1]["at"]


@pytest.mark.leaves_keys("diracx:tasks:*")
def test_watch_shows_queues_and_worst_alerts_on_a_small_terminal(
    served: Cli, redis_url: str, wait_until: Callable[..., None]
) -> None:
    with SyncRedis.from_url(redis_url) as redis:
        for stream in ALL_STREAM_NAMES:  # an alert for each: no worker runs
            redis.xadd(stream, {"data": b"x"})
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    os.set_blocking(ours, False)
    seen = bytearray()

    def complete() -> bool:
        with suppress(BlockingIOError):
            seen.extend(os.read(ours, 65_536))
        return all(text in seen for text in (b"background:large", b"scheduler leads", b"no worker of size"))

    command = [sys.executable, "-m", "diracx.tasks", "status", "--watch"]
    environment = served.environment | {"TERM": "xterm"}
    with subprocess.Popen(command, env=environment, stdin=its, stdout=its, stderr=its) as watching:
        try:
            wait_until(complete, "queues and alerts are on the screen")
        finally:
            watching.terminate()
    os.close(its)
    os.close(ours)


@pytest.mark.leaves_keys("diracx:tasks:*")
def test_a_queue_that_no_worker_serves_is_reported_and_can_be_purged(
    served: Cli, one_line: Callable[..., str]
) -> None:
    for name in ("Ada", "\\u001b[31mred"):
        served.mine("submit", "my_tasks:Greet", "--args", f'["{name}"]')
    assert "! normal:medium: 2 tasks wait, and no worker of size medium runs" in served("status").stdout
    peeked = served("queue", "peek", "normal:medium", "--module", "my_tasks.py")
    assert 'name="Ada"' in peeked.stdout
    assert "\x1b" not in peeked.stdout
    page = shown(served("queue", "peek", "normal:medium", "--limit", "1", "--json"))
    assert page["items"][0]["arguments"] == {"0": "Ada", "1": 1}
    rest = shown(served("queue", "peek", "normal:medium", "--after", page["after"], "--json"))
    assert len(rest["items"]) == 1

    one_line(served("queue", "purge", "normal:medium"), 2, "Cancel 2 tasks", "--yes")
    one_line(served("queue", "purge", "normal:tiny", "--yes"), 2, "no queue 'normal:tiny'", "normal:large")
    assert shown(served("queue", "purge", "normal:medium", "--yes", "--json"))["cancelled"] == 2
    assert served("queue", "peek", "normal:medium").stdout == ""


@pytest.mark.leaves_keys("diracx:tasks:*", "lock:*")
def test_running_waiting_and_locked_tasks_are_listed_and_a_lock_is_released(
    holding: Cli, one_line: Callable[..., str], wait_until: Callable[..., None], redis_url: str
) -> None:
    worker = holding.start("worker", "--module", "my_tasks.py", "--lease-seconds", "2", "--grace", "0")
    first = hold(holding, "one")
    wait_until((holding.directory / "begun-one").exists, "the first runs")
    second = hold(holding, "one")
    key = "lock:mutex:task:one"

    def reported() -> bool:
        lock = json.loads(holding("locks", "show", key, "--json").stdout or "{}")
        return bool(lock) and lock["waiters"] == 1 and lock["holders"][0]["task_id"] == first

    wait_until(reported, "the worker has reported the task that holds the lock")
    running = holding("running", "--module", "my_tasks.py").stdout
    assert first in running
    assert key in running
    assert 'password="•••"' in running
    [task] = shown(holding("running", "--json"))["items"]
    assert task["arguments"]["1"] == "•••"
    [seen] = shown(holding("workers", "--json"))
    assert (seen["alive"], seen["slots"], seen["slots_used"]) == (True, 10, 1)
    assert "1 of 10" in holding("workers").stdout
    delayed = holding("queue", "delayed", "--reason", "lock", "--module", "my_tasks.py").stdout
    assert second in delayed
    assert key in delayed
    assert " lock            -  normal:" in delayed, "no due time"
    assert "1 for locks" in holding("status").stdout
    assert f"my_tasks:Hold {first}" in holding("locks", "list").stdout
    with SyncRedis.from_url(redis_url) as client:
        everything = [client.dump(name) for name in client.keys("diracx:monitor:*")]
    assert not [dump for dump in everything if b"sesame" in (dump or b"")]

    refused = holding("locks", "release", key)
    assert refused.returncode == 2
    assert f"held by my_tasks:Hold {first}" in refused.stderr
    assert "it will be cancelled" in refused.stderr
    assert holding("locks", "release", key, typed="n\n", terminal=True).returncode == 1
    assert reported()
    released = holding("locks", "release", key, typed="y\n", terminal=True)
    assert (released.returncode, "1 released" in released.stdout) == (0, True), released.stdout
    worker.until("LockLostError")

    def handed_over() -> bool:
        lock = json.loads(holding("locks", "show", key, "--json").stdout or "{}")
        return bool(lock) and lock["holders"] and lock["holders"][0]["task_id"] == second

    wait_until(handed_over, "the second task has the lock")

    def counted() -> bool:
        report = shown(holding("tasks", "stats", "--failures", "5", "--json"))
        return bool(report["stats"]) and report["failures"][0]["type"] == "LockLostError"

    wait_until(counted, "the failure is counted")
    report = holding("tasks", "stats", "--failures", "5")
    assert "100%" in report.stdout
    assert first in report.stdout
    assert "sesame" not in report.stdout
    worker.process.terminate()
    worker.ends()
    assert shown(holding("workers", "--json")) == []


def test_a_key_that_is_no_lock_is_refused_in_one_line(served: Cli, one_line: Callable[..., str]) -> None:
    one_line(served("locks", "show", "diracx:tasks:alive"), 2, "is not the key of a lock")
    one_line(served("locks", "show", "lock:mutex:task:none"), 1, "lock:mutex:task:none has neither holders nor")
    one_line(served("locks", "release", "lock:mutex:task:none", "--yes"), 1, "is not held")


def test_a_lock_outside_the_task_system_can_be_shown_and_released(served: Cli, redis_url: str) -> None:
    with SyncRedis.from_url(redis_url) as client:
        client.set("lock:mutex:job:42", "another", px=60_000)
    assert "a holder outside the task system" in served("locks", "show", "lock:mutex:job:42").stdout
    assert shown(served("locks", "release", "lock:mutex:job:42", "--yes", "--json"))["released"] == 1
    with SyncRedis.from_url(redis_url) as client:
        assert client.get("lock:mutex:job:42") is None


def test_the_program_lists_the_commands_of_operators(cli: Cli, tmp_path: Path) -> None:
    listed = cli("--help").stdout
    for command in ("status", "workers", "running", "queue", "locks", "tasks"):
        assert f" {command} " in listed


def test_dead_letters_that_wait_for_a_database_are_listed_without_their_secrets(
    served: Cli, redis_url: str, wait_until: Callable[..., None]
) -> None:
    assert served("dlq", "waiting").stderr == "no dead letters wait in Redis\n"
    (served.directory / "doomed.py").write_text(_DOOMED)
    worker = served.start("worker", "--module", "doomed.py")
    served("submit", "doomed:Doomed", "--args", '["me", "sesame"]', "--module", "doomed.py")
    worker.until("goes to the dead letters")
    wait_until(lambda: "doomed:Doomed" in served("dlq", "waiting").stdout, "it waits")
    table = served("dlq", "waiting", "--module", "doomed.py").stdout
    assert 'user="me", password="•••"' in table
    [row] = json.loads(served("dlq", "waiting", "--json").stdout)["items"]
    assert (row["reason"], row["detail"], row["failed_attempts"]) == (
        "exhausted",
        "not for •••",
        1,
    )
    assert "sesame" not in table + json.dumps(row)
    assert worker.process.poll() is None
    served.stop()
    with SyncRedis.from_url(redis_url) as client:
        client.delete("diracx:tasks:dead-letters")


_DOOMED = """
from dataclasses import dataclass
from diracx.tasks.plumbing import BaseTask

@dataclass
class Doomed(BaseTask):
    user: str
    password: str
    secret_fields = frozenset({"password"})
    dlq_eligible = True

    async def execute(self):
        raise ValueError(f"not for {self.password}")
"""
