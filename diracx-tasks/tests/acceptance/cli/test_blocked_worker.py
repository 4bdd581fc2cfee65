"""Detection of tasks that block the event loop, in real workers."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator

import pytest
from redis import Redis
from support.command_line import Background, Cli

BLOCKING = """
import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

from diracx.tasks.plumbing import BaseTask


@dataclass
class Sleeps(BaseTask):
    until: str

    async def execute(self):
        while not Path(self.until).exists():
            time.sleep(0.1)  # in place of asyncio.sleep


@dataclass
class Spins(BaseTask):
    until: str

    async def execute(self):
        await asyncio.gather(self.count_up())

    async def count_up(self):
        while not Path(self.until).exists():
            sum(range(1000))
"""


@pytest.fixture
def worker(served: Cli) -> Iterator[Background]:
    (served.directory / "blocking.py").write_text(BLOCKING)
    started = served.start("worker", "--module", "blocking.py", "--lease-seconds", "3")
    started.until("ready")
    yield started
    started.process.send_signal(signal.SIGKILL)


@pytest.mark.leaves_keys("diracx:*")
@pytest.mark.parametrize(("task", "line"), [("Sleeps", "time.sleep(0.1)"), ("Spins", "in count_up")])
def test_a_blocked_worker_is_reported_with_task_and_stack_until_it_runs_again(
    served: Cli, worker: Background, redis_url: str, task: str, line: str, wait_until: Callable[..., None]
) -> None:
    until = served.directory / "until"
    args = json.dumps([str(until)])
    task_id = served("submit", task, "--args", args, "--module", "blocking.py").stdout.split()[-1]

    def blocked() -> bool:
        [found] = json.loads(served("workers", "--json").stdout)
        return found["blocked"] is not None and found["alive"]

    wait_until(blocked, "it is said to be blocked")
    # As if it had been so for hours, and every report of the loop were forgotten.
    with Redis.from_url(redis_url) as redis:
        redis.delete("diracx:monitor:reporting", *redis.keys("diracx:monitor:worker:*"))
    wait_until(blocked, "it says so again")
    [found] = json.loads(served("workers", "--json").stdout)
    assert (found["blocked"]["task_id"], found["blocked"]["task_name"]) == (task_id, f"blocking:{task}")
    assert line in found["blocked"]["stack"]
    [running] = json.loads(served("running", "--json").stdout)["items"]
    assert (running["task_id"], running["blocks_worker"]) == (task_id, True)
    worker.until(f"blocking:{task} {task_id} blocks the event loop")
    worker.until(line)
    assert f"blocking:{task}" in served("workers").stdout

    until.touch()
    wait_until(lambda: not blocked(), "it is blocked no more")
    wait_until(lambda: json.loads(served("running", "--json").stdout)["items"] == [], "the task is gone")
