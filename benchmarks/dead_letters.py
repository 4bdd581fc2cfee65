"""Costs of many failures at once for other tasks and for memory, with the database up or away.

`make bench-dead-letters` writes its section of RESULTS.md. Given the URLs of Redis and of the database, the module
is such a worker: it ends with its input, and prints the latencies in seconds.
"""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from diracx.tasks.plumbing import BaseTask, Priority, schedule_many
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.persistence import TaskDB
from diracx.tasks.plumbing.worker import Worker
from diracx.tasks.plumbing.worker.settings import WorkerSettings
from diracx.tasks.testing import TaskSystem, embedded_redis
from diracx.tasks.testing.server import free_port

from .results import machine, write_section

#: After the burst, other tasks are looked at for so long: time-outs of the database are shorter.
_AFTER_SECONDS = 25.0
_STREAM = keys.stream_name_for("normal", "medium")
_PAUSE_SECONDS = 0.01

latencies: list[float] = []


@dataclass
class Failing(BaseTask):
    """Becomes a dead letter."""

    number: int
    dlq_eligible = True

    async def execute(self) -> None:
        raise ValueError(self.number)


@dataclass
class Other(BaseTask):
    """Notes how long after its submission it starts."""

    submitted: float
    priority = Priority.REALTIME

    async def execute(self) -> None:
        latencies.append(time.time() - self.submitted)


REGISTRY = {"bench:Failing": Failing, "bench:Other": Other}


async def work(url: str, db_url: str) -> None:
    broker, stop, db = RedisStreamBroker(url), asyncio.Event(), TaskDB(db_url)
    worker = Worker(broker, REGISTRY, settings=WorkerSettings(max_concurrent_tasks=20), task_db=db)
    async with db.engine_context():
        asyncio.get_running_loop().add_reader(sys.stdin, stop.set)
        await worker.run(stop)
        print(json.dumps(latencies), flush=True)


@dataclass(frozen=True)
class Burst:
    """Costs of one burst of failures."""

    p50_ms: float
    p99_ms: float
    longest_ms: float
    others: int
    rss_before_mb: float
    rss_most_mb: float
    waiting: int
    """Dead letters in Redis at the end."""


@contextmanager
def database(state: str) -> Iterator[str]:
    """URL of a database that is `up`, `refusing` connections, or `hanging`: it takes them and says nothing."""
    with tempfile.TemporaryDirectory() as directory, socket.socket() as silent:
        if state == "up":
            yield f"sqlite+aiosqlite:///{directory}/dead_letters.db"
            return
        port = free_port()
        if state == "hanging":
            silent.bind(("127.0.0.1", port))
            silent.listen(1000)
        yield f"mysql+aiomysql://root@127.0.0.1:{port}/dead_letters"


@asynccontextmanager
async def _process(url: str, db_url: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.dead_letters", url, db_url),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        limit=1 << 26,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def burst(failures: int, state: str) -> Burst:
    """The cost of so many failures at once, with the database in that state."""
    with embedded_redis() as url, database(state) as db_url:
        if state == "up":
            db = TaskDB(db_url)
            async with db.engine_context(), db.engine.begin() as connection:
                await connection.run_sync(db.metadata.create_all)
        async with (
            TaskSystem(REGISTRY, redis_url=url, workers=0, scheduler=False, task_db_url=None) as system,
            _process(url, db_url) as process,
        ):
            redis = system.broker.redis
            while not await redis.zcard(keys.ALIVE):
                await asyncio.sleep(0.05)
            await _watch_memory(process.pid, 2.0)
            before = rss_mb(process.pid)
            submitting = asyncio.create_task(schedule_many([Failing(number) for number in range(failures)]))
            most = 0.0
            while not submitting.done() or (await redis.xinfo_groups(_STREAM))[0]["lag"]:
                most = max(most, await _watch_memory(process.pid, 1.0))
            await submitting
            most = max(most, await _watch_memory(process.pid, _AFTER_SECONDS))
            waiting = await redis.xlen(keys.DEAD_LETTERS)
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            measured = json.loads(await process.stdout.readline())
    cuts = statistics.quantiles(measured, n=100)
    return Burst(*(cuts[49] * 1000, cuts[98] * 1000, max(measured) * 1000, len(measured)), before, most, waiting)


async def _watch_memory(pid: int, seconds: float) -> float:
    """Submit another task again and again. Returns the most memory that the worker has had, in MB."""
    end, most = time.monotonic() + seconds, 0.0
    while time.monotonic() < end:
        await Other(time.time()).schedule()
        most = max(most, rss_mb(pid))
        await asyncio.sleep(_PAUSE_SECONDS)
    return most


def rss_mb(pid: int) -> float:
    """Memory that the process has at present."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 1e6


async def report() -> str:
    """The section of RESULTS.md."""
    rows = []
    for failures in (5_000, 20_000):
        for state in ("up", "refusing", "hanging"):
            found = await burst(failures, state)
            rows.append(
                f"| {failures:,} | {state} | {found.p50_ms:.1f} / {found.p99_ms:.1f} / {found.longest_ms:.0f} ms "
                f"| {found.rss_before_mb:.0f} → {found.rss_most_mb:.0f} MB | {found.waiting:,} |"
            )
            print(rows[-1], flush=True)
    table = "\n".join(rows)
    return f"""## Many failures at once

Measured by `make bench-dead-letters` on {datetime.now(UTC):%Y-%m-%d}: {machine()}. One worker process with
20 slots runs tasks that become dead letters as fast as it can, and another task of higher priority every
{_PAUSE_SECONDS * 1000:.0f} ms, also for {_AFTER_SECONDS:.0f} s after the last failure. The database is SQLite
(up), a closed port (refusing), or a port that accepts connections and never responds (hanging).
Absolute figures of a shared machine vary.

| failures | database | latency of other tasks, p50 / p99 / longest | memory of the worker | waiting in Redis |
|---|---|---|---|---|
{table}
"""


if __name__ == "__main__":
    if len(sys.argv) > 1:
        asyncio.run(work(*sys.argv[1:]))
    else:
        write_section("make bench-dead-letters", asyncio.run(report()))
