"""What waiting workers cost the server, and how soon one of them begins: `make bench-idle`."""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from dataclasses import dataclass
from typing import Any

from diracx.tasks.plumbing import BaseTask
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis

from .results import RESULTS, machine, write_section

#: As in production; nothing is kept of a finished task.
SETTINGS = {"result_ttl_seconds": None, "housekeeping_seconds": 60.0}

#: From the submission of a task to that of the next.
PAUSE_SECONDS = 0.1


class Begins(BaseTask):
    """Notes that it has begun."""

    begun: asyncio.Future[float]

    async def execute(self) -> None:
        Begins.begun.set_result(time.perf_counter())


@dataclass(frozen=True)
class Cost:
    """Of a number of workers that wait."""

    workers: int
    per_task: float
    """Server commands from the submission to the settlement, without those of waiting."""
    p50_ms: float
    p99_ms: float
    """From `schedule()` to the first line of the task."""
    server_ms_per_task: float
    idle_per_second: float
    """Server commands per worker."""
    connections: float
    """Per worker."""


async def _commands(redis: Redis) -> int:
    stats: Any = await redis.info("commandstats")
    return sum(each["calls"] for name, each in stats.items() if name != "cmdstat_info")


async def _processor_seconds(redis: Redis) -> float:
    used: Any = await redis.info("cpu")
    return float(used["used_cpu_user"] + used["used_cpu_sys"])


async def measure(workers: int, tasks: int, idle_seconds: float, warm_up: float = 5.0) -> Cost:
    """With so many workers in this process, each with 10 slots."""
    system = TaskSystem([Begins], workers=workers, scheduler=False, task_db_url=None, settings=SETTINGS)
    async with system:
        redis = system.broker.redis
        await asyncio.sleep(warm_up)
        connections = len(await redis.client_list()) - 1  # one is ours
        before, began = await _commands(redis), time.monotonic()
        await asyncio.sleep(idle_seconds)
        idle = (await _commands(redis) - before) / (time.monotonic() - began)
        before, began, used = await _commands(redis), time.monotonic(), await _processor_seconds(redis)
        seconds = []
        for _ in range(tasks):
            Begins.begun = asyncio.get_running_loop().create_future()
            asked = time.perf_counter()
            await Begins().schedule()
            seconds.append(await Begins.begun - asked)
            await asyncio.sleep(max(0.0, asked + PAUSE_SECONDS - time.perf_counter()))
        used = await _processor_seconds(redis) - used
        commands = await _commands(redis) - before - idle * (time.monotonic() - began)
    seconds.sort()
    return Cost(
        workers=workers,
        per_task=commands / tasks,
        p50_ms=1000 * seconds[len(seconds) // 2],
        p99_ms=1000 * seconds[int(0.99 * len(seconds))],
        server_ms_per_task=1000 * used / tasks,
        idle_per_second=idle / workers,
        connections=connections / workers,
    )


def report(costs: list[Cost]) -> str:
    """The section of RESULTS.md."""
    lines = [
        "## Waiting workers",
        "",
        f"{machine()}. Load of the machine at the end: {os.getloadavg()[0]:.1f}.",
        "All workers, of 10 slots each, are in one process with the client, which submits a no-op task every",
        f"{PAUSE_SECONDS:g} s. Commands are those of `INFO commandstats`, which counts the call of a script",
        "and each command inside it. Per task: from the submission to the settlement, with what workers report",
        "of it, less what the same workers run when idle. Connections are those of the client, too.",
        "",
        "| idle workers | server commands per task | latency p50 / p99 (ms) | server (ms per task) "
        "| idle: commands per worker and second | connections per worker |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {each.workers} | {each.per_task:.1f} | {each.p50_ms:.2f} / {each.p99_ms:.2f} "
        f"| {each.server_ms_per_task:.2f} | {each.idle_per_second:.2f} | {each.connections:.1f} |"
        for each in costs
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-idle", description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 10, 60, 400], help="numbers of workers")
    parser.add_argument("--tasks", type=int, default=600, help="tasks for each of them")
    parser.add_argument("--idle-seconds", type=float, default=60.0, help="how long to look at idle workers")
    parser.add_argument("--warm-up", type=float, default=60.0, help="seconds from the start to the first count")
    parser.add_argument("--dry-run", action="store_true", help="print only, leave RESULTS.md as it is")
    arguments = parser.parse_args()
    costs = [
        asyncio.run(measure(workers, arguments.tasks, arguments.idle_seconds, arguments.warm_up))
        for workers in arguments.workers
    ]
    text = report(costs)
    print(text)
    if not arguments.dry_run:
        write_section("make bench-idle", text)
        print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
