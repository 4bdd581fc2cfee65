"""The option `worker --processes N`: several worker processes."""

from __future__ import annotations

import os
import signal

import pytest
from diracx.tasks.plumbing.broker.models import TaskMessage
from redis import Redis

_LOOK = """
import os


class Look(BaseTask):
    async def execute(self) -> str:
        variables = ("DIRACX_TASKS_SUPERVISOR_SOCKET", "DIRACX_TASKS_PROCESS_NUMBER")
        return f"set: {[name for name in variables if name in os.environ]}"
"""

_SECOND_WAITS = """
import time
from pathlib import Path

try:
    Path("first").touch(exist_ok=False)
except FileExistsError:
    while not Path("go").exists():
        time.sleep(0.01)
    assert not Path("broken").exists()
"""


@pytest.fixture
def two(served, wait_until):
    """A supervisor with two workers that are ready."""
    served.add_tasks(_LOOK)
    supervisor = served.start("worker", "--processes", "2", "--module", "my_tasks.py")
    wait_until(lambda: supervisor.output.count("ready: medium tasks") == 2, "two workers are ready")
    return supervisor


def children_of(process):
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as children:
        return [int(pid) for pid in children.read().split()]


@pytest.mark.leaves_keys("diracx:tasks:*")  # the killed worker has not been removed yet
def test_a_killed_process_is_restarted_and_a_signal_stops_all(two, served, wait_until):
    ready = [line for line in two.output.splitlines() if "ready: medium" in line]
    assert {line.rpartition("[worker.process=")[2] for line in ready} == {"1]", "2]"}
    victim, other = children_of(two.process)
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: two.output.count("ready: medium tasks") == 3, "another worker is ready")
    assert "has ended (killed by SIGKILL)" in two.output
    assert other in children_of(two.process)
    done = served("submit", "my_tasks:Look", "--wait", "--module", "my_tasks.py")
    # A process that a task starts is not bound to the supervisor.
    assert "set: []" in done.stdout, done.stdout + done.stderr
    two.process.send_signal(signal.SIGINT)
    assert two.ends() == 0, two.output
    assert "stopped: all 2 processes have ended" in two.output


def test_workers_stop_when_their_supervisor_was_killed(two, wait_until):
    two.process.kill()
    wait_until(lambda: two.output.count(" stopped [worker.process=") == 2, "all workers have stopped")
    assert two.output.count("the supervisor has ended") == 2


def test_a_worker_that_cannot_start_is_reported_and_ends_the_supervisor(cli):
    supervisor = cli.start("worker", "--processes", "2", "--redis-url", "redis://127.0.0.1:1")
    assert supervisor.ends() == 1, supervisor.output
    assert "cannot reach Redis" in supervisor.output
    assert "Traceback" not in supervisor.output


def test_a_process_that_cannot_start_does_not_stop_running_ones(served, wait_until):
    served.add_tasks(_SECOND_WAITS)
    supervisor = served.start("worker", "--processes", "2", "--module", "my_tasks.py")
    wait_until(lambda: supervisor.output.count("ready: medium tasks") == 1, "one worker is ready")
    broken = served.directory / "broken"
    broken.touch()
    (served.directory / "go").touch()
    wait_until(lambda: "has ended (exit code" in supervisor.output, "the other one could not start")
    broken.unlink()
    wait_until(lambda: supervisor.output.count("ready: medium tasks") == 2, "it could in the end")
    assert "stopping" not in supervisor.output


@pytest.mark.leaves_keys("diracx:tasks:alive", "diracx:tasks:leases")
def test_each_task_wakes_one_of_the_processes_that_wait(two, served, wait_until, redis_url):
    def calls(redis):
        stats = redis.info("commandstats")
        return {name.removeprefix("cmdstat_"): each["calls"] for name, each in stats.items()}

    with Redis.from_url(redis_url) as redis:

        def all_wait():
            return sum(client["cmd"] == "xreadgroup" for client in redis.client_list()) == 2

        def run(tasks):
            for _ in range(tasks):
                redis.xadd("diracx:tasks:normal:medium", {"data": message.dumpb()})
                wait_until(lambda: not redis.xlen("diracx:tasks:normal:medium"), "it is settled")
                wait_until(all_wait, "both wait")

        name = "my_tasks:Greet"
        message = TaskMessage(task_id="greet", task_name=name, task_args=["you"])
        wait_until(all_wait, "both wait")
        run(4)  # the server knows all scripts from here on
        before = calls(redis)
        run(20)
        after = calls(redis)
    calls = {name: after[name] - before.get(name, 0) for name in after}
    assert calls["xreadgroup"] <= 22, "one call of one worker for each; and a wait may have ended meanwhile"
    assert calls.get("xread", 0) == 0
    assert calls["xack"] == 20
