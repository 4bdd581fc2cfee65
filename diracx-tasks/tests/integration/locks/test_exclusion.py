"""Mutual exclusion under failures of network, process and event loop.

A witness outside Redis judges: each execution writes to a file for as long as it works, on the one monotonic clock
of this machine. Two holders may overlap by no more than it takes to cancel an execution.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from support.exclusive_tasks import BlocksUnderLock, WorksUnderLock
from support.network import Network
from support.paths import SUPPORT
from support.waiting import until
from support.warm_commands import Running, WarmCommands

pytestmark = pytest.mark.leaves_keys("diracx:tasks:*", "lock:rw:*")

LEASE_SECONDS = 2.0
#: Between two notes of a task, and what a busy machine adds to it.
SCHEDULING_DELAY_SECONDS = 0.3


class Workers:
    """Worker processes, each behind a network of its own."""

    def __init__(self, redis_url: str, directory: Path, commands: WarmCommands) -> None:
        self._redis_url = redis_url
        self._commands = commands
        self.witness = directory / "witness"
        self.networks: list[Network] = []
        self.processes: list[Running] = []

    def start(self, lease_seconds: float = LEASE_SECONDS, loop: str = "asyncio") -> int:
        """Start one, wait until it is ready, and return its position."""
        self.networks.append(Network(self._redis_url))
        self.networks[-1].start()
        script = SUPPORT / "exclusive_tasks.py"
        env = {**os.environ, "TEST_WITNESS": str(self.witness), "TEST_REDIS_URL": self._redis_url}
        arguments = self.networks[-1].url, str(lease_seconds), loop
        self.processes.append(self._commands.worker(script, *arguments, env=env))
        return len(self.processes) - 1

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for between in self.networks:
            between.stop()

    def notes(self) -> dict[int, list[float]]:
        """Worker's pid -> when (monotonic) it worked under the lock."""
        found: dict[int, list[float]] = {}
        if self.witness.exists():
            for line in self.witness.read_text().splitlines():
                pid, moment = line.split()
                found.setdefault(int(pid), []).append(float(moment))
        return found

    def overlap_seconds(self) -> float:
        """The longest time for which two workers worked under the lock side by side."""
        spans = sorted((min(moments), max(moments)) for moments in self.notes().values())
        return max((first[1] - second[0] for first, second in pairwise(spans)), default=0.0)


@pytest.fixture
def workers(redis_url: str, tmp_path: Path, warm_commands: WarmCommands) -> Iterator[Workers]:
    started = Workers(redis_url, tmp_path, warm_commands)
    yield started
    started.stop()


async def submit(redis_url: str, task: WorksUnderLock | BlocksUnderLock) -> None:
    async with TaskSystem([type(task)], redis_url=redis_url, workers=0, scheduler=False, task_db_url=None):
        await task.schedule()


@pytest.mark.parametrize(
    ("lock", "held"),
    [
        ("mutex", ("to_server", "to_client")),
        ("short mutex", ("to_client",)),
        ("writer", ("to_server",)),
        ("reader", ("to_client",)),
        ("slot", ("to_server", "to_client")),
    ],
)
async def test_a_disconnected_worker_stops_before_another_holds_its_lock(
    workers: Workers, redis_url: str, lock: str, held: tuple[str, ...]
) -> None:
    """Connections stay open without responses, so that a renewal hangs and raises nothing."""
    first = workers.start(loop="uvloop" if len(held) == 1 else "asyncio")
    await submit(redis_url, WorksUnderLock(lock, 60.0))
    await until(workers.notes, "the task works")
    workers.start()
    workers.networks[first].hold(*held)
    await until(lambda: len(workers.notes()) == 2, "the task is started again")
    assert workers.overlap_seconds() < SCHEDULING_DELAY_SECONDS


async def test_a_paused_worker_does_not_continue_a_task_whose_lock_another_worker_holds(
    workers: Workers, redis_url: str
) -> None:
    first = workers.start()
    await submit(redis_url, WorksUnderLock("mutex", 60.0))
    await until(workers.notes, "the task works")
    workers.start()
    workers.processes[first].send_signal(signal.SIGSTOP)
    await until(lambda: len(workers.notes()) == 2, "the task is started again")
    before = len(workers.notes()[workers.processes[first].pid])
    workers.processes[first].send_signal(signal.SIGCONT)
    await until(lambda: len(workers.notes()[workers.processes[1].pid]) > 20, "the second worker works on")
    # It is in the middle of a step when it goes on: that one may end.
    assert len(workers.notes()[workers.processes[first].pid]) - before <= SCHEDULING_DELAY_SECONDS / 0.02


async def test_a_task_that_blocked_the_event_loop_beyond_its_lease_commits_nothing(
    workers: Workers, redis_url: str, redis: Redis
) -> None:
    """The cancellation cannot reach a blocked loop, but the later result of the task does not count."""
    first = workers.start()
    await submit(redis_url, BlocksUnderLock("mutex", 4.0))
    await until(workers.notes, "the task works")
    workers.networks[first].hold()
    await until(lambda: len(workers.notes()[workers.processes[first].pid]) == 2, "it has been blocked to its end")
    workers.networks[first].release()
    await until(lambda: workers.processes[first].poll() is None and workers.notes(), "the worker lives")
    workers.start()
    await until(lambda: sum(map(len, workers.notes().values())) >= 3, "the task is started again, here or there")


# --- leases of different lengths ---------------------------------------------------------------------------------

SHORT_SECONDS, LONG_SECONDS = 1.0, 12.0


async def test_a_short_lease_survives_an_outage_although_a_long_one_has_not_expired(
    workers: Workers, redis_url: str, redis: Redis
) -> None:
    short = workers.start(SHORT_SECONDS)
    await submit(redis_url, WorksUnderLock("", 5.0))
    await until(workers.notes, "the task works")
    long = workers.start(5 * LONG_SECONDS)
    pid = workers.processes[short].pid
    [name] = [name for name in await redis.zrange(keys.ALIVE, 0, -1) if f":{pid}:".encode() in name]

    async def left_seconds() -> float:
        seconds, microseconds = await redis.time()
        return float(await redis.zscore(keys.ALIVE, name) or 0) / 1000 - seconds - microseconds / 1e6

    for network in workers.networks:
        network.hold()
    await until(left_seconds, when=lambda found: found <= -0.5)
    workers.networks[long].release()
    await until(left_seconds, when=lambda found: found >= 0)  # the first to be back looks for dead workers
    workers.networks[short].release()
    await until(lambda: spent_seconds(workers, pid) > 4.9, "the task ends where it began")
    assert list(workers.notes()) == [pid], "it has run once"


def spent_seconds(workers: Workers, pid: int) -> float:
    moments = workers.notes()[pid]
    return max(moments) - min(moments)


@pytest.mark.parametrize("comes_last", ["the long lease", "the short lease"])
async def test_P9_a_lost_worker_is_detected_by_its_own_lease_and_not_by_that_of_others(
    workers: Workers, redis_url: str, redis: Redis, comes_last: str
) -> None:
    """Workers with a long lease are notified of the short one, renew at its interval and check when it expires."""
    if comes_last == "the short lease":
        workers.start(LONG_SECONDS)
        # It takes no task, nor hears of anything, before the other one has the task.
        workers.processes[0].send_signal(signal.SIGSTOP)
        await until(lambda: redis.info("clients"), when=lambda found: not found["blocked_clients"])
    short = workers.processes[workers.start(SHORT_SECONDS)]
    await submit(redis_url, WorksUnderLock("mutex", 30.0))
    await until(workers.notes, "the task works")
    if comes_last == "the short lease":
        workers.processes[0].send_signal(signal.SIGCONT)
    else:
        workers.start(LONG_SECONDS)
    short.kill()
    killed_at = time.monotonic()
    await until(lambda: len(workers.notes()) == 2, "the task is started again")
    started_at = min(min(moments) for pid, moments in workers.notes().items() if pid != short.pid)
    assert started_at - killed_at < SHORT_SECONDS + 1 + SCHEDULING_DELAY_SECONDS


async def test_a_long_lease_keeps_its_locks_when_the_list_of_workers_is_lost(
    workers: Workers, redis_url: str, redis: Redis
) -> None:
    """The worker is cut off and cannot renew; one with a short lease detects its expiry."""
    long = workers.start(4 * SHORT_SECONDS)
    await submit(redis_url, WorksUnderLock("mutex", 30.0))
    await until(workers.notes, "the task works")
    workers.start(SHORT_SECONDS)
    workers.networks[long].hold()
    await redis.delete(keys.ALIVE)
    await until(lambda: len(workers.notes()) == 2, "the task is started again")
    assert workers.overlap_seconds() < SCHEDULING_DELAY_SECONDS
