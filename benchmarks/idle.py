"""Costs of idle workers, and the time until one of them starts a task: `make bench-idle`."""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from diracx.tasks.plumbing import BaseTask
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.plumbing.broker.lease_audit import AUDIT_LEASES
from diracx.tasks.plumbing.broker.scripts import script
from diracx.tasks.plumbing.worker.reporter import REPORT_SECONDS
from diracx.tasks.plumbing.worker.settings import WorkerSettings
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis

from .results import RESULTS, machine, write_section

#: As in production; nothing is kept of a finished task.
SETTINGS = {"result_ttl_seconds": None, "housekeeping_seconds": 60.0}

#: Everything that an idle worker does recurs within this time: the rarest is the audit.
_PERIOD_SECONDS = AUDIT_LEASES * WorkerSettings().lease_seconds

#: From the submission of a task to that of the next.
PAUSE_SECONDS = 0.1


class Begins(BaseTask):
    """Notes that it has begun."""

    begun: asyncio.Future[float]

    async def execute(self) -> None:
        Begins.begun.set_result(time.perf_counter())


class Holds(BaseTask):
    """Keeps a slot of its worker."""

    running = 0
    over: asyncio.Event

    async def execute(self) -> None:
        Holds.running += 1
        await Holds.over.wait()


#: Scripts that workers run whether there are tasks or not.
_OF_WAITING = {
    script(name).sha for name in ("renew", "reclaim", "fetch_unacknowledged", "promote", "dead_letters")
}
_REPORT = script("report").sha
#: Commands of a report that tells of tasks, and not of an idle one.
_TELLS = {"HINCRBY", "LPOP", "HGET"}
#: Ends the log of commands.
_OVER = "over"


class CommandLog:
    """Every command that the server runs, by the call that causes it: a script with the commands inside it."""

    def __init__(self) -> None:
        self._calls: list[list[str]] = []
        self._listens = asyncio.Event()

    @asynccontextmanager
    async def of(self, redis: Redis) -> AsyncIterator[CommandLog]:
        """Keeps it by `MONITOR`."""
        listening = asyncio.create_task(self._listen(redis))
        await self._listens.wait()
        yield self
        await redis.echo(_OVER)
        await listening

    async def _listen(self, redis: Redis) -> None:
        async with redis.monitor() as monitor:
            self._listens.set()
            while (command := await monitor.next_command())["command"] != f"ECHO {_OVER}":
                if command["client_type"] == "lua":
                    self._calls[-1].append(command["command"].split(" ", 1)[0])
                else:
                    self._calls.append([command["command"]])

    def of_tasks(self, deliveries: int) -> int:
        """The commands that so many tasks have caused. Those that cannot be distinguished from others count.

        Each was delivered by a wait, which is two commands; other waits have ended with nothing.
        """
        return 2 * deliveries + sum(len(call) for call in self._calls if not self._of_waiting(call))

    @staticmethod
    def _of_waiting(call: list[str]) -> bool:
        name, *arguments = call[0].split(" ", 2)
        if name in ("EVALSHA", "EVAL"):
            return arguments[0] in _OF_WAITING or (arguments[0] == _REPORT and not _TELLS.intersection(call))
        if name in ("EXISTS", "SET", "XINFO", "ZADD"):
            return any(key in call[0] for key in (keys.CANCELLED, keys.AUDITOR, "CONSUMERS", keys.ALIVE))
        return name in ("XREADGROUP", "TIME", "INFO", "CLIENT", "MONITOR", "HELLO", "SUBSCRIBE")


@dataclass(frozen=True)
class Cost:
    """Costs of a number of waiting workers."""

    workers: int
    busy: bool
    """True if each runs a task beside its wait."""
    per_task: float
    """Server commands that tasks cause, from the submission to the settlement, with what is reported of them."""
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


async def measure(
    workers: int, tasks: int, idle_seconds: float, warm_up: float = 5.0, *, busy: bool = False
) -> Cost:
    """With so many workers in this process, each with 10 slots."""
    system = TaskSystem([Begins, Holds], workers=workers, scheduler=False, task_db_url=None, settings=SETTINGS)
    async with system:
        redis = system.broker.redis
        await (_make_busy(workers) if busy else asyncio.sleep(0))
        await asyncio.sleep(warm_up)
        connections = len(await redis.client_list()) - 1  # one is ours
        before, began = await _commands(redis), time.monotonic()
        await asyncio.sleep(idle_seconds)
        idle = (await _commands(redis) - before) / (time.monotonic() - began)
        used = await _processor_seconds(redis)
        seconds = []
        async with CommandLog().of(redis) as log:
            for _ in range(tasks):
                Begins.begun = asyncio.get_running_loop().create_future()
                asked = time.perf_counter()
                await Begins().schedule()
                seconds.append(await Begins.begun - asked)
                await asyncio.sleep(max(0.0, asked + PAUSE_SECONDS - time.perf_counter()))
            await asyncio.sleep(2 * REPORT_SECONDS)
        used = await _processor_seconds(redis) - used
        if busy:
            Holds.over.set()
    seconds.sort()
    return Cost(
        workers=workers,
        busy=busy,
        per_task=log.of_tasks(tasks) / tasks,
        p50_ms=1000 * seconds[len(seconds) // 2],
        p99_ms=1000 * seconds[int(0.99 * len(seconds))],
        server_ms_per_task=1000 * used / tasks,
        idle_per_second=idle / workers,
        connections=connections / workers,
    )


async def _make_busy(workers: int) -> None:
    """Give each worker a task to run, and wait until each waits beside it."""
    Holds.running, Holds.over = 0, asyncio.Event()
    for number in range(1, workers + 1):
        await Holds().schedule()  # the worker that has waited longest is given it: not one that was given one
        while Holds.running < number:
            await asyncio.sleep(0.005)


def report(costs: list[Cost]) -> str:
    """The section of RESULTS.md."""
    lines = [
        "## Idle workers",
        "",
        f"{machine()}. Load of the machine at the end: {os.getloadavg()[0]:.1f}.",
        "All workers, of 10 slots each, are in one process with the client, which submits a no-op task every",
        f"{PAUSE_SECONDS:g} s. Commands are those of `INFO commandstats`, which counts the call of a script",
        "and each command inside it. Per task: each command that `MONITOR` shows, except those of waiting:",
        "renewals, checks for crashed workers and due tasks, empty reports, waits without a message.",
        f"Without tasks: in {_PERIOD_SECONDS:g} s, the period after which all commands of waiting workers recur.",
        "Connections are those of the client, too. A busy worker runs one task beside its wait.",
        "",
        "| workers | server commands per task | latency p50 / p99 (ms) | server (ms per task) "
        "| without tasks: commands per worker and second | connections per worker |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {each.workers} {'busy' if each.busy else 'idle'} "
        f"| {each.per_task:.1f} | {each.p50_ms:.2f} / {each.p99_ms:.2f} "
        f"| {each.server_ms_per_task:.2f} | {each.idle_per_second:.2f} | {each.connections:.1f} |"
        for each in costs
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-idle", description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 10, 60, 400], help="numbers of workers")
    parser.add_argument("--busy", type=int, nargs="*", default=[60], help="numbers of busy workers")
    parser.add_argument("--tasks", type=int, default=600, help="tasks for each number of workers")
    parser.add_argument(
        "--idle-seconds", type=float, default=_PERIOD_SECONDS, help="duration of the measurement of idle workers"
    )
    parser.add_argument("--warm-up", type=float, default=60.0, help="seconds from the start to the first count")
    parser.add_argument("--dry-run", action="store_true", help="print only, leave RESULTS.md as it is")
    arguments = parser.parse_args()
    costs = [
        asyncio.run(measure(workers, arguments.tasks, arguments.idle_seconds, arguments.warm_up, busy=busy))
        for busy, numbers in ((False, arguments.workers), (True, arguments.busy))
        for workers in numbers
    ]
    text = report(costs)
    print(text)
    if not arguments.dry_run:
        write_section("make bench-idle", text)
        print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
