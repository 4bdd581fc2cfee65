"""Crashed workers: tasks are restarted elsewhere, locks are released."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from diracx.tasks.plumbing import ExclusiveRWLock
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from support.crashing_tasks import LEASE_SECONDS, TASKS, Blocks, Kills, KillsTwice, Marks, MarksOnce, Notes
from support.network import Network
from support.paths import SUPPORT
from support.waiting import until
from support.warm_commands import Running, WarmCommands

# Workers that are killed leave their names, and the queue's group their consumers, until they are reclaimed.
# A worker may be killed between two commands: those that send its sums, or a mark, and give them a time to live.
pytestmark = pytest.mark.leaves_keys("diracx:tasks:*", "diracx:monitor:sums", "started:*")

SETTINGS = {"lease_seconds": LEASE_SECONDS}


@pytest.fixture
def worker(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, warm_commands: WarmCommands
) -> Iterator[Callable[..., Running]]:
    """Starts worker processes of their own, and ends them with the test."""
    monkeypatch.setenv("TEST_REDIS_URL", redis_url)
    started = []

    def start(url: str = redis_url) -> Running:
        script = SUPPORT / "crashing_tasks.py"
        started.append(warm_commands.worker(script, url, env={**os.environ, "TEST_HANGS": "1"}))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


async def test_P10_P16_a_killed_workers_task_starts_elsewhere_within_one_lease(
    worker: Callable[[], Running], redis_url: str, redis: Redis
) -> None:
    process = worker()
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0):
        task_id = await Marks("a").schedule()
    await until(lambda: redis.exists("started:a"))
    process.kill()
    process.wait()
    killed = time.monotonic()
    assert not await ExclusiveRWLock(JOB, "a-read").acquire(redis), "the dead reader still counts"
    async with TaskSystem(TASKS, redis_url=redis_url, workers=1, settings=SETTINGS) as system:
        result = await system.result(task_id, timeout=60)
        assert time.monotonic() - killed < LEASE_SECONDS + 10, "one lease, and what a busy machine needs"
        assert result.return_value == os.getpid()
        await system.drain()
        assert await redis.llen("started:a") == 2
        await until(lambda: _is(redis.zcard(keys.ALIVE), 1))
        [group] = await redis.xinfo_groups("diracx:tasks:normal:medium")
        assert group["consumers"] <= 1, "P3: the dead worker's consumer is gone"


async def test_a_task_that_must_not_start_twice_fails_when_its_worker_dies(
    worker: Callable[[], Running], redis_url: str, redis: Redis
) -> None:
    process = worker()
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0):
        task_id = await MarksOnce("once").schedule()
    await until(lambda: redis.exists("started:once"))
    process.kill()
    process.wait()
    async with TaskSystem(TASKS, redis_url=redis_url, workers=1, settings=SETTINGS) as system:
        result = await system.result(task_id, timeout=60)
        assert result.error is not None
        assert "at most once" in result.error["message"]
        await system.drain()
        assert system.task_db is not None
        async with system.task_db as db:
            [dead_letter] = await db.search()
        assert dead_letter["reason"] == "exhausted"
    assert await redis.llen("started:once") == 1


async def test_P21_reader_counts_of_a_dead_worker_are_released(
    worker: Callable[[], Running], redis_url: str, redis: Redis
) -> None:
    process = worker()
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0):
        await Marks("d").schedule()
    await until(lambda: redis.exists("started:d"))
    process.kill()
    process.wait()
    writer = ExclusiveRWLock(JOB, "d-read")
    assert not await writer.acquire(redis), "the dead reader still counts"
    async with TaskSystem(TASKS, redis_url=redis_url, workers=1, settings=SETTINGS) as system:
        await until(lambda: _is(redis.llen("started:d"), 2))
        await system.drain()
        assert await writer.acquire(redis)
        await writer.release(redis)


async def _is(call: Any, value: Any) -> bool:
    return bool(await call == value)


async def test_P9_a_task_that_kills_its_worker_is_poison_after_max_deliveries(
    worker: Callable[[], Running], redis_url: str
) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0):
        await Kills().schedule()
    for _ in range(3):
        assert worker().wait(timeout=60) == -signal.SIGKILL
    async with TaskSystem(TASKS, redis_url=redis_url, workers=1, settings=SETTINGS) as system:
        await system.drain(timeout=60)
        assert system.task_db is not None
        async with system.task_db as db:
            [dead_letter] = await db.search()
        assert dead_letter["reason"] == "poison"
        assert dead_letter["task_name"] == "test:Kills"


@pytest.mark.leaves_keys("diracx:tasks:*", "begun:twice", "may-end:twice")
async def test_P9_a_disconnected_worker_is_not_counted_as_a_third_crash_of_its_task(
    worker: Callable[..., Running], redis_url: str, redis: Redis
) -> None:
    """Two workers have died with it. The third one is away for longer than its lease, and comes back."""
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0):
        task_id = await KillsTwice().schedule()
    for _ in range(2):
        assert worker().wait(timeout=60) == -signal.SIGKILL
    network = Network(redis_url)
    network.start()
    try:
        process = worker(network.url)
        await until(lambda: _is(redis.get("begun:twice"), b"3"))
        async with TaskSystem(TASKS, redis_url=redis_url, workers=1, settings=SETTINGS) as system:
            network.hold()
            name = next(n for n in await redis.zrange(keys.ALIVE, 0, -1) if f":{process.pid}:".encode() in n)
            await until(lambda: _is(redis.zcount(keys.ALIVE, "-inf", 0), 1))
            assert await redis.zscore(keys.ALIVE, name) < 0, "the other one has noticed it"
            network.release()
            await until(lambda: _is(redis.zcount(keys.ALIVE, 1, "+inf"), 2))
            await redis.set("may-end:twice", 1)
            result = await system.result(task_id, timeout=60)
            assert result.return_value == process.pid, result.error
            await system.drain()
            assert system.task_db is not None
            async with system.task_db as db:
                assert await db.search() == []
        assert await redis.get("begun:twice") == b"3"
    finally:
        network.stop()


async def test_a_task_that_blocks_the_event_loop_keeps_its_lease_and_its_lock(
    worker: Callable[[], Running], redis_url: str
) -> None:
    first, second = worker(), worker()
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0) as system:
        result = await system.result(await Blocks(3 * LEASE_SECONDS).schedule(), timeout=60)
    assert result.return_value == "kept", result.error
    assert first.poll() is None
    assert second.poll() is None


async def test_a_paused_worker_detects_its_lost_lease_and_settles_nothing(
    worker: Callable[[], Running], redis_url: str, redis: Redis
) -> None:
    process = worker()
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0):
        task_id = await Marks("b").schedule()
    await until(lambda: redis.exists("started:b"))
    process.send_signal(signal.SIGSTOP)
    async with TaskSystem(TASKS, redis_url=redis_url, workers=1, settings=SETTINGS) as system:
        first = await system.result(task_id, timeout=60)
        assert first.return_value == os.getpid()
        process.send_signal(signal.SIGCONT)
        # It comes back, is alive again, and its execution is cancelled: the result stays ours.
        await until(lambda: _is(redis.zcard(keys.ALIVE), 2))
        marker = await Marks("c", ends=True).schedule()
        await system.result(marker, timeout=60)
        assert (await system.result(task_id)).return_value == os.getpid()
        await system.drain()


async def test_P5_a_task_reclaimed_from_a_paused_worker_does_not_start_there(
    worker: Callable[[], Running], redis_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a lock, and although the lease is renewed before the worker checks its deliveries."""
    monkeypatch.setenv("TEST_PAUSES", "1")
    process = worker()
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0):
        task_id = await Notes("n").schedule()
    await until(lambda: _is(_state(process.pid), "T"))
    async with TaskSystem(TASKS, redis_url=redis_url, workers=1, settings=SETTINGS) as system:
        assert (await system.result(task_id, timeout=60)).return_value == os.getpid()
    process.send_signal(signal.SIGCONT)
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0):
        await Notes("next").schedule()
    await until(lambda: redis.exists("started:next"))
    assert await redis.lrange("started:n", 0, -1) == [str(os.getpid()).encode()]


async def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
