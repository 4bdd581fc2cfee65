"""The option `worker --hard-limit`: ends the process of a task that ignores its cancellation."""

from __future__ import annotations

import json

import pytest
from diracx.tasks.testing.server import free_port
from redis import Redis
from support.network import Network

STUBBORN = """
import asyncio
import atexit
import time
from dataclasses import dataclass
from pathlib import Path

from diracx.tasks.plumbing import BaseTask, MutexLock
from diracx.tasks.plumbing.lock_registry import JOB


@dataclass
class Deaf(BaseTask):
    '''Swallows every cancellation.'''

    begun: str

    @property
    def execution_locks(self):
        return [MutexLock(JOB, "deaf", ttl_ms=900)]

    async def execute(self):
        Path(self.begun).touch()
        while True:
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                pass


class BlocksWithALock(Deaf):
    async def execute(self):
        await asyncio.sleep(1)  # its worker waits beside it
        Path(self.begun).touch()
        time.sleep(600)


class DeafAfterASecond(Deaf):
    time_limit_seconds = 1
    dlq_eligible = True


@dataclass
class Blocks(BaseTask):
    '''Blocks the event loop, which never hears of the time limit.'''

    begun: str
    time_limit_seconds = 1

    async def execute(self):
        Path(self.begun).touch()
        time.sleep(600)


class Threaded(Deaf):
    async def execute(self):
        atexit.register(Path(self.begun).with_suffix(".flushed").touch)
        print("buffered until the end")
        Path(self.begun).touch()
        # More calls than there are threads.
        await asyncio.gather(*(asyncio.to_thread(time.sleep, 600) for _ in range(40)))


@dataclass
class Slow(BaseTask):
    begun: str
    seconds: float

    async def execute(self):
        with open(self.begun, "a") as file:
            file.write("x")
        await asyncio.sleep(self.seconds)
        return "finished"
"""
MODULE = ("--module", "stubborn.py")


@pytest.fixture
def stubborn(served, tmp_path):
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    return served


def _ready(cli, hard_limit, *options):
    """A worker with this hard limit that is ready."""
    worker = cli.start("worker", "--hard-limit", hard_limit, *options, *MODULE)
    worker.until("ready")
    return worker


def _submit(cli, task, begun, **further):
    kwargs = json.dumps({"begun": str(begun), **further})
    return cli.start("submit", f"stubborn:{task}", "--kwargs", kwargs, "--wait", *MODULE)


def _error(worker):
    (line,) = [
        line for line in worker.output.splitlines() if "ERROR" in line and "ignores its cancellation" in line
    ]
    return line


def _starts_again(redis_url, waiting):
    """The interrupted task is in its queue again for another worker, and clients continue to wait."""
    with Redis.from_url(redis_url) as redis:
        assert redis.xlen("diracx:tasks:normal:medium:handover") == 1
        redis.delete("diracx:tasks:normal:medium:handover")
    assert waiting.process.poll() is None


def test_a_task_that_swallows_its_time_limit_ends_the_worker_when_the_others_have_ended(
    stubborn, redis_url, tmp_path, wait_until
):
    worker = _ready(stubborn, "1")
    kind = _submit(stubborn, "Slow", tmp_path / "slow", seconds=6)
    deaf = _submit(stubborn, "DeafAfterASecond", tmp_path / "begun")
    wait_until(lambda: (tmp_path / "slow").exists() and (tmp_path / "begun").exists(), "both run")
    assert worker.ends() == 70, worker.output
    assert "stubborn:DeafAfterASecond" in _error(worker)
    assert kind.ends() == 0, "what else ran may end"
    assert "finished" in kind.output
    assert deaf.ends() == 1, "it has failed, by its policy"
    assert "TimeLimitExceededError" in deaf.output
    assert (tmp_path / "slow").read_text() == "x"
    with Redis.from_url(redis_url) as redis:
        assert redis.xlen("diracx:tasks:dead-letters") == 1
        redis.delete("diracx:tasks:dead-letters")


def test_a_task_that_was_past_its_time_limit_when_its_worker_stopped_has_failed_by_its_time_limit(
    stubborn, redis_url, tmp_path, wait_until
):
    worker = _ready(stubborn, "1", "--grace", "0.5")
    slow = _submit(stubborn, "Slow", tmp_path / "slow", seconds=600)
    deaf = _submit(stubborn, "DeafAfterASecond", tmp_path / "begun")
    wait_until(lambda: (tmp_path / "slow").exists() and (tmp_path / "begun").exists(), "both run")
    assert worker.ends() == 70, worker.output
    assert deaf.ends() == 1
    assert "TimeLimitExceededError" in deaf.output
    _starts_again(redis_url, slow)
    with Redis.from_url(redis_url) as redis:
        redis.delete("diracx:tasks:dead-letters")


def test_a_task_that_blocks_the_event_loop_past_its_time_limit_ends_the_worker(stubborn, tmp_path, wait_until):
    worker = _ready(stubborn, "1")
    slow = _submit(stubborn, "Slow", tmp_path / "slow", seconds=8)
    wait_until((tmp_path / "slow").exists, "it runs")
    blocks = _submit(stubborn, "Blocks", tmp_path / "begun")
    wait_until((tmp_path / "begun").exists, "it blocks")
    assert worker.ends() == 70, worker.output
    assert "stubborn:Blocks" in _error(worker)
    assert blocks.ends() == 1
    assert "TimeLimitExceededError" in blocks.output
    # What was cut off begins again at once: the lease of 30 s need not end.
    second = stubborn.start("worker", *MODULE)
    assert slow.ends() == 0, slow.output + second.output
    assert (tmp_path / "slow").read_text() == "xx"


@pytest.mark.parametrize("task", ["Deaf", "BlocksWithALock"])
def test_a_task_that_ignores_the_loss_of_its_lock_ends_the_worker(stubborn, redis_url, tmp_path, wait_until, task):
    worker = _ready(stubborn, "1", "--grace", "1")
    deaf = _submit(stubborn, task, tmp_path / "begun")
    wait_until((tmp_path / "begun").exists, "it runs")
    with Redis.from_url(redis_url) as redis:
        redis.set("lock:mutex:job:deaf", "another", px=30_000)
    assert worker.ends() == 70, worker.output
    assert f"stubborn:{task}" in _error(worker)
    if task == "Deaf":
        assert "LockLostError" in worker.output
    _starts_again(redis_url, deaf)


def test_a_task_that_ignores_the_loss_of_its_lock_does_not_wait_for_the_grace_period_of_others(
    stubborn, redis_url, tmp_path, wait_until
):
    """Another task may have the lock by then."""
    network = Network(redis_url)
    network.start()
    stubborn.environment["DIRACX_TASKS_REDIS_URL"] = network.url
    worker = _ready(stubborn, "1", "--lease-seconds", "3", "--grace", "600")
    stubborn.environment["DIRACX_TASKS_REDIS_URL"] = redis_url
    _submit(stubborn, "Deaf", tmp_path / "begun")
    _submit(stubborn, "Slow", tmp_path / "slow", seconds=600)
    wait_until(lambda: (tmp_path / "slow").exists() and (tmp_path / "begun").exists(), "both run")
    network.hold()
    assert worker.ends() == 70, worker.output
    assert "stubborn:Deaf" in _error(worker)
    network.stop()
    with Redis.from_url(redis_url) as redis:
        redis.flushdb()


def test_a_task_that_ignores_the_stop_of_its_worker_ends_it(stubborn, redis_url, tmp_path, wait_until):
    worker = _ready(stubborn, "1", "--grace", "0.2")
    deaf = _submit(stubborn, "Deaf", tmp_path / "begun")
    wait_until((tmp_path / "begun").exists, "it runs")
    worker.process.terminate()
    assert worker.ends() == 70, worker.output
    assert "stubborn:Deaf" in _error(worker)
    assert "WorkerStoppedError" in worker.output
    _starts_again(redis_url, deaf)


def test_with_a_hard_limit_a_worker_stops_normally_if_its_tasks_do(stubborn, redis_url, tmp_path, wait_until):
    worker = _ready(stubborn, "30", "--grace", "0.2")
    slow = _submit(stubborn, "Slow", tmp_path / "slow", seconds=600)
    wait_until((tmp_path / "slow").exists, "it runs")
    worker.process.terminate()
    assert worker.ends() == 0, worker.output
    _starts_again(redis_url, slow)


@pytest.mark.parametrize("event_loop", ["asyncio", "uvloop"])
def test_calls_in_threads_delay_neither_a_new_connection_nor_the_end_of_their_worker(
    stubborn, redis_url, tmp_path, wait_until, event_loop
):
    stubborn.environment |= {
        "DIRACX_TASKS_REDIS_URL": redis_url.replace("127.0.0.1", "localhost"),
        "PYTHONPATH": str(tmp_path),
    }
    if event_loop == "asyncio":
        (tmp_path / "uvloop.py").write_text("raise ImportError('not installed')")
    worker = stubborn.start(
        "worker", "--grace", "0.2", "--metrics-port", str(free_port()), *MODULE, new_python=True
    )
    worker.until("ready")
    threaded = _submit(stubborn, "Threaded", tmp_path / "begun")
    wait_until((tmp_path / "begun").exists, "it runs")
    with Redis.from_url(redis_url) as redis:
        redis.client_kill_filter(_type="normal", skipme=True)
    worker.process.terminate()
    assert worker.ends() == 0, worker.output
    assert "stopped" in worker.output
    assert "the process ends without it" in worker.output
    assert "without the last settlements" not in worker.output
    assert "buffered until the end" in worker.output
    assert (tmp_path / "begun.flushed").exists()
    _starts_again(redis_url, threaded)
