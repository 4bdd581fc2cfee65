"""Time until the tasks of a lost worker run again, in each case: `python -m benchmarks.recovery`.

Real worker processes on an embedded Valkey. For each task of the lost worker: the time from the end of the worker
to the next start of the task, and the part of it after the expiry of the worker's lease.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from diracx.tasks.plumbing import schedule_many
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.plumbing.registry import tasks_of_module
from diracx.tasks.testing import TaskSystem, embedded_redis

from . import recovery_tasks as tasks
from .results import machine, write_section

_QUEUED = 1500
_PATIENCE_SECONDS = 60.0


@dataclass
class World:
    """A server with worker processes."""

    system: TaskSystem
    url: str
    directory: Path
    lease: float
    processes: list[asyncio.subprocess.Process] = field(default_factory=list)
    died: dict[int, float] = field(default_factory=dict)
    """Process -> when it was killed, stopped or paused."""
    lease_ends: dict[int, float] = field(default_factory=dict)

    async def worker(self, slots: int, *options: str) -> int:
        """Start one. Returns its process id when it takes tasks."""
        command = [sys.executable, "-m", "diracx.tasks", "worker", "--log-level", "error"]
        command += ["--module", tasks.__name__]
        command += ["--lease-seconds", str(self.lease), "--max-concurrent-tasks", str(slots), *options]
        environment: dict[str, str] = {
            **os.environ,
            "DIRACX_TASKS_REDIS_URL": self.url,
            tasks.WITNESS: str(self.directory),
        }
        process = await asyncio.create_subprocess_exec(*command, env=environment)
        self.processes.append(process)
        await self.until(lambda: self._registered(process.pid))
        return process.pid

    async def _leases(self) -> dict[int, float]:
        alive: Any = await self.system.broker.redis.zrange(keys.ALIVE, 0, -1, withscores=True)
        return {int(name.split(b":")[-2]): end / 1000 for name, end in alive}

    async def _registered(self, pid: int) -> bool:
        return pid in await self._leases()

    async def until(self, reached: Callable[[], Awaitable[bool]]) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not await reached():
            if time.monotonic() > deadline:
                raise TimeoutError("it never came to that")
            await asyncio.sleep(0.02)

    async def end(self, *pids: int, with_signal: int = signal.SIGKILL) -> None:
        """Send each the signal, and note when its lease ends by what the server knows."""
        for pid in pids:
            os.kill(pid, with_signal)
            self.died[pid] = time.time()
        self.lease_ends |= {pid: end for pid, end in (await self._leases()).items() if pid in pids}

    def runs(self, n: int) -> list[tuple[int, float]]:
        """Process and moment of each start of a task."""
        path = self.directory / str(n)
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(pid), float(at)) for mark, pid, at in map(str.split, lines) if mark == "begun"]

    async def begun(self, numbers: range, times: int) -> None:
        """Until all of them have begun so often."""

        async def reached() -> bool:
            return all(len(self.runs(n)) >= times for n in numbers)

        await self.until(reached)


@dataclass(frozen=True)
class Waits:
    """Times of each task of the lost worker, in seconds."""

    in_all: list[float]
    after_lease: list[float]
    """Without the lease, or a lease for each death."""
    overtaken: int
    """Number of times that another task of the same queue took a slot over a second after the end of the lease."""


def waits(world: World, victims: range, others: range = range(0)) -> Waits:
    later = [at for n in others for _, at in world.runs(n)]
    in_all, after_lease, overtaken = [], [], 0
    for n in victims:
        (pid, _), (_, again), *_ = world.runs(n)
        end = world.lease_ends.get(pid, world.died[pid])
        in_all.append(again - world.died[pid])
        after_lease.append(again - end)
        overtaken += sum(end + 1 < at < again for at in later)
    return Waits(in_all, after_lease, overtaken)


async def _filled(world: World, number: int, first: int = 0) -> int:
    """A worker that runs so many tasks."""
    pid = await world.worker(number)
    await schedule_many([tasks.Held(first + n) for n in range(number)])
    await world.begun(range(first, first + number), 1)
    return pid


async def idle(world: World) -> Waits:
    """a worker crashes, others are idle"""
    victim = await _filled(world, 10)
    for _ in range(2):
        await world.worker(10)
    await world.end(victim)
    await world.begun(range(10), 2)
    return waits(world, range(10))


async def busy(world: World) -> Waits:
    """a worker crashes, others have no free slot, and a long queue"""
    victim = await _filled(world, 20)
    short = range(1000, 1600)
    await schedule_many([tasks.Short(n, 0.1) for n in short])
    for _ in range(2):
        await world.worker(4)
    await world.begun(short[:10], 1)
    await world.end(victim)
    await world.begun(range(20), 2)
    return waits(world, range(20), short)


async def several(world: World) -> Waits:
    """three of five workers crash at once, with 300 tasks"""
    victims = [await _filled(world, 100, 100 * number) for number in range(3)]
    for _ in range(2):
        await world.worker(10)
    await world.end(*victims)
    await world.begun(range(300), 2)
    return waits(world, range(300))


async def everybody(world: World) -> Waits:
    """all workers crash, a new one starts"""
    victims = [await _filled(world, 10, 10 * number) for number in range(2)]
    await world.end(*victims)
    await asyncio.sleep(world.lease)
    await world.worker(20)
    arrived = time.time()
    for pid in victims:
        world.died[pid] = arrived
        world.lease_ends[pid] = arrived + world.lease
    await world.begun(range(20), 2)
    return waits(world, range(20))


async def stopped(world: World) -> Waits:
    """SIGTERM, the grace period is over"""
    pid = await world.worker(10, "--grace", "0")
    await schedule_many([tasks.Held(n) for n in range(10)])
    await world.begun(range(10), 1)
    await world.worker(10)
    await world.end(pid, with_signal=signal.SIGTERM)
    world.lease_ends[pid] = world.died[pid]  # it requeues its tasks
    await world.begun(range(10), 2)
    return waits(world, range(10))


async def paused(world: World) -> Waits:
    """a worker is paused"""
    victim = await _filled(world, 10)
    await world.worker(10)
    await world.end(victim, with_signal=signal.SIGSTOP)
    await world.begun(range(10), 2)
    return waits(world, range(10))


async def poison(world: World) -> Waits:
    """a task kills each of its workers, others are idle: last start of the tasks beside it"""
    return await _poisoned(world, 0)


async def poison_busy(world: World) -> Waits:
    """a task kills each of its workers, others have a long queue: last start of the tasks beside it"""
    return await _poisoned(world, _QUEUED)


async def _poisoned(world: World, queued: int) -> Waits:
    victim, innocent = await world.worker(10), range(9)
    await schedule_many([*(tasks.Held(n, again_seconds=0.5) for n in innocent), tasks.Kills(100)])
    await world.begun(innocent, 1)
    await world.begun(range(100, 101), 1)
    for _ in range(5):
        await world.worker(10)
    short = range(1000, 1000 + queued)
    await schedule_many([tasks.Short(n, 0.2 + n % 7 / 10) for n in short])
    await world.begun(short[:50], 1)
    (world.directory / tasks.GO).touch()
    killed = world.died[victim] = time.time() + 0.2
    redis = world.system.broker.redis

    async def ended() -> bool:
        streams: list[Any] = [await redis.xrange(stream) for stream in keys.EVERY_STREAM]
        return not any(b":Held" in fields[b"data"] for entries in streams for _, fields in entries)

    await world.until(ended)
    lasts = [world.runs(n)[-1][1] for n in innocent]
    redeliveries = [len(world.runs(n)) - 1 for n in innocent]
    return Waits(
        [at - killed for at in lasts],
        [at - killed - died * world.lease for at, died in zip(lasts, redeliveries, strict=True)],
        0,
    )


CASES = (idle, busy, several, everybody, stopped, paused, poison, poison_busy)


async def measure(case: Callable[[World], Awaitable[Waits]], lease: float) -> Waits:
    with tempfile.TemporaryDirectory() as directory, embedded_redis() as url:
        async with TaskSystem(
            tasks_of_module(tasks), redis_url=url, workers=0, scheduler=False, task_db_url=None
        ) as system:
            world = World(system, url, Path(directory), lease)
            try:
                return await case(world)
            finally:
                for process in world.processes:
                    if process.returncode is None:
                        process.kill()
                        await process.wait()


async def measure_all(lease: float, rounds: int, names: list[str]) -> list[str]:
    rows = []
    for case in CASES:
        if names and case.__name__ not in names:
            continue
        found = [await measure(case, lease) for _ in range(rounds)]
        in_all = [each for one in found for each in one.in_all]
        after = [each for one in found for each in one.after_lease]
        overtaken = sum(one.overtaken for one in found)
        figures = (f"{statistics.median(each):.2f} / {max(each):.2f} s" for each in (in_all, after))
        row = f"| {case.__doc__} | {' | '.join(figures)} | {overtaken} |"
        print(row, flush=True)
        rows.append(row)
    return rows


def report(rows: list[str], lease: float, rounds: int) -> str:
    table = "\n".join(rows)
    return f"""## Recovery from a crash of a worker

Measured by `python -m benchmarks.recovery` on {datetime.now(UTC):%Y-%m-%d}: {machine()}. The lease is {lease:g} s;
{rounds} rounds of each case, real processes. The promise: [guarantees](../docs/explanation/guarantees.md).

| case | time until its tasks start again, median / longest | without the lease | overtaken by newer tasks |
|---|---|---|---|
{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=__doc__)
    parser.add_argument("--lease", type=float, default=2.0, help="lease of the workers in seconds (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each case (default 3)")
    parser.add_argument("--dry-run", action="store_true", help="print only, leave RESULTS.md as it is")
    parser.add_argument("cases", nargs="*", help="(default: all)")
    arguments = parser.parse_args()
    rows = asyncio.run(measure_all(arguments.lease, arguments.rounds, arguments.cases))
    if not arguments.dry_run:
        write_section("python -m benchmarks.recovery", report(rows, arguments.lease, arguments.rounds))


if __name__ == "__main__":
    main()
