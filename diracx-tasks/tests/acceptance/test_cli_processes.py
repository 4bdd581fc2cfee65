"""`worker --processes N`: several processes behind one command, as an operator sees them."""

from __future__ import annotations

import os
import signal

import pytest


@pytest.fixture
def three(served, wait_until):
    """A supervisor with three workers that are ready."""
    supervisor = served.start("worker", "--processes", "3", "--module", "my_tasks.py")
    wait_until(lambda: supervisor.output.count("ready: medium tasks") == 3, "three workers are ready")
    return supervisor


def children_of(process):
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as children:
        return [int(pid) for pid in children.read().split()]


def test_each_process_works_and_all_write_one_log(three, served):
    numbers = {line.split("[")[1][0] for line in three.output.splitlines() if "ready: medium" in line}
    assert numbers == {"1", "2", "3"}
    submitted = served("submit", "my_tasks:Greet", "--args", '["you"]', "--wait", "--module", "my_tasks.py")
    assert "Hello you" in submitted.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_them_all_with_exit_code_0(three, wait_until, number):
    children = children_of(three.process)
    assert len(children) == 3
    three.process.send_signal(number)
    assert three.ends() == 0, three.output
    assert three.output.count("stopped\n") >= 3
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children)


@pytest.mark.leaves_keys("diracx:tasks:alive")  # nobody has buried it yet
def test_what_dies_is_started_again(three, wait_until):
    victim, *others = children_of(three.process)
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: three.output.count("ready: medium tasks") == 4, "another worker is ready")
    assert "has ended (killed by SIGKILL)" in three.output
    now = children_of(three.process)
    assert len(now) == 3
    assert set(others) < set(now)
    three.process.terminate()
    assert three.ends() == 0, three.output


def test_workers_stop_when_their_supervisor_was_killed(three, wait_until):
    three.process.kill()
    wait_until(lambda: three.output.count("stopped\n") == 3, "all workers have stopped")
    assert three.output.count("the supervisor is gone") == 3


def test_what_cannot_start_is_said_once_for_each_and_ends_it(cli):
    supervisor = cli.start("worker", "--processes", "2", "--redis-url", "redis://127.0.0.1:1")
    assert supervisor.ends() == 1, supervisor.output
    assert "cannot reach Redis" in supervisor.output
    assert "Traceback" not in supervisor.output
