"""What a task costs the server and the wire, counted, not timed: `make bench-count`.

These figures are the same on every machine, so a test (`test_counts.py` of diracx-tasks) holds them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

from diracx.tasks.plumbing import BaseTask, MutexLock, schedule_many
from diracx.tasks.plumbing.broker.keys import stream_name_for
from diracx.tasks.plumbing.lock_registry import TASK
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.testing import TaskSystem, embedded_redis
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection

_STREAM = stream_name_for("normal", "medium")
#: Long enough that nothing but the tasks happens while they are counted.
_QUIET = {"result_ttl_seconds": None, "housekeeping_seconds": 600.0, "lease_seconds": 600.0}


@dataclass
class NoOp(BaseTask):
    """Does nothing."""

    number: int

    async def execute(self) -> None:
        pass


@dataclass
class Locked(NoOp):
    """Does nothing, behind a mutex of its own."""

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(TASK, self.number)]


@dataclass(frozen=True)
class Counts:
    """Of one scenario, per task."""

    round_trips: float
    """Requests sent by us, pipelines counted once."""
    commands: float
    """Commands the server ran, those inside scripts included."""
    bytes_sent: float
    bytes_received: float


async def _server(redis: Redis) -> tuple[int, int]:
    """Commands run, and bytes answered, since the server's start."""
    stats: Any = await redis.info("commandstats")
    network: Any = await redis.info("stats")
    commands = sum(stat["calls"] for name, stat in stats.items() if name != "cmdstat_info")
    return commands, network["total_net_output_bytes"]


@asynccontextmanager
async def counted(redis: Redis, tasks: int) -> AsyncIterator[list[Counts]]:
    """Count what happens inside the block; the list then has the counts."""
    found: list[Counts] = []
    sent = requests = 0
    send = AbstractConnection.send_packed_command

    async def counting(self: Any, command: Any, check_health: bool = True) -> None:
        nonlocal sent, requests
        requests += 1
        sent += len(command) if isinstance(command, bytes | str) else sum(map(len, command))
        await send(self, command, check_health)

    first, before = await _server(redis), await _server(redis)
    with patch.object(AbstractConnection, "send_packed_command", counting):
        yield found
    after = await _server(redis)
    asking = before[1] - first[1]  # what the question itself is answered
    found.append(
        Counts(
            round_trips=round(requests / tasks, 3),
            commands=round((after[0] - before[0]) / tasks, 2),
            bytes_sent=round(sent / tasks),
            bytes_received=round((after[1] - before[1] - asking) / tasks),
        )
    )


async def one_by_one(tasks: int) -> Counts:
    """`schedule()`, each awaited."""
    async with (
        TaskSystem([NoOp], workers=0, scheduler=False) as system,
        counted(system.broker.redis, tasks) as found,
    ):
        for number in range(tasks):
            await NoOp(number).schedule()
    return found[0]


async def in_bulk(tasks: int) -> Counts:
    """`schedule_many()`."""
    async with (
        TaskSystem([NoOp], workers=0, scheduler=False) as system,
        counted(system.broker.redis, tasks) as found,
    ):
        await schedule_many([NoOp(number) for number in range(tasks)])
    return found[0]


async def _drain(tasks: int, task_class: type[NoOp], **settings: Any) -> Counts:
    """A backlog, from the start of a worker with 100 slots to the settlement of the last task."""
    with embedded_redis() as url:
        system = partial(
            TaskSystem,
            [task_class],
            redis_url=url,
            scheduler=False,
            concurrency=100,
            settings={**_QUIET, **settings},
            task_db_url=None,
        )
        async with system(workers=0):
            await schedule_many([task_class(number) for number in range(tasks)])
        async with Redis.from_url(url) as redis, counted(redis, tasks) as found, system(workers=1) as running:
            await running.drain(60)
    return found[0]


async def drain(tasks: int) -> Counts:
    """No-ops by one worker."""
    return await _drain(tasks, NoOp)


async def drain_locked(tasks: int) -> Counts:
    """The same, each behind a mutex of its own."""
    return await _drain(tasks, Locked)


async def drain_with_results(tasks: int) -> Counts:
    """The same, each result kept for an hour."""
    return await _drain(tasks, NoOp, result_ttl_seconds=3600)


SCENARIOS: dict[str, Callable[[int], Awaitable[Counts]]] = {
    "enqueue one by one": one_by_one,
    "enqueue in bulk": in_bulk,
    "drain": drain,
    "drain, one mutex per task": drain_locked,
    "drain, results kept": drain_with_results,
}


async def count_all(tasks: int) -> dict[str, Counts]:
    """The counts of every scenario."""
    return {name: await scenario(tasks) for name, scenario in SCENARIOS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-count", description=__doc__)
    parser.add_argument("--tasks", type=int, default=2000, help="tasks of each scenario (default 2000)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    counts = asyncio.run(count_all(arguments.tasks))
    if arguments.json:
        print(json.dumps({name: asdict(found) for name, found in counts.items()}))
        return
    print(f"{'per task':28}{'round trips':>14}{'commands':>12}{'bytes sent':>14}{'received':>12}")
    for name, found in counts.items():
        numbers = f"{found.round_trips:>14}{found.commands:>12}{found.bytes_sent:>14}{found.bytes_received:>12}"
        print(f"{name:28}{numbers}")


if __name__ == "__main__":
    main()
