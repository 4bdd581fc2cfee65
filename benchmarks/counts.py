"""Round trips, commands and bytes of a task: `make bench-count`.

These figures are the same on every machine; a test (`test_counts.py` of diracx-tasks) checks their bounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, ClassVar
from unittest.mock import patch

from diracx.tasks.plumbing import BaseTask, MutexLock, RetryPolicyBase, schedule_many, spawn_with_callback
from diracx.tasks.plumbing.base_task import current_message
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


@dataclass
class Alone(NoOp):
    """Does nothing, behind a mutex that it shares with all others."""

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(TASK, "alone")]


class AtOnce(RetryPolicyBase):
    """The second attempt follows the first."""

    def schedule_retry(self, attempt: int, exception: Exception) -> datetime | None:
        return datetime.now(UTC) if attempt == 0 else None


@dataclass
class Unlucky(NoOp):
    """Fails at its first attempt."""

    retry_policy: ClassVar[RetryPolicyBase] = AtOnce()

    async def execute(self) -> None:
        message = current_message.get()
        if message is None or not message.attempts:
            raise RuntimeError("the first attempt")


@dataclass
class Bell(NoOp):
    """Says when it has begun."""

    async def execute(self) -> None:
        _rung.set()


_rung = asyncio.Event()


@dataclass(frozen=True)
class Counts:
    """Round trips, commands and bytes of a scenario, per task."""

    round_trips: float
    """Requests sent by us, pipelines counted once."""
    commands: float
    """Commands the server ran, those inside scripts included."""
    bytes_sent: float
    bytes_received: float


async def _server(redis: Redis) -> tuple[int, int]:
    """Commands run, and bytes sent, since the server's start."""
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
    asking = before[1] - first[1]  # the reply to INFO itself
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
    async with TaskSystem([NoOp], workers=0, scheduler=False) as system:
        await NoOp(-1).schedule()  # the connection stands
        async with counted(system.broker.redis, tasks) as found:
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


async def in_bulk_for_later(tasks: int) -> Counts:
    """`schedule_many()` with a moment before which none may begin."""
    async with (
        TaskSystem([NoOp], workers=0, scheduler=False) as system,
        counted(system.broker.redis, tasks) as found,
    ):
        await schedule_many(
            [NoOp(number) for number in range(tasks)], at_time=datetime.now(UTC) + timedelta(days=1)
        )
    return found[0]


async def _in_a_group(tasks: Sequence[BaseTask]) -> None:
    await spawn_with_callback(tasks, NoOp(-1))


async def _due_now(tasks: Sequence[BaseTask]) -> None:
    await schedule_many(tasks, at_time=datetime.now(UTC))


async def _drain(
    tasks: int,
    task_class: type[NoOp],
    submit: Callable[[Sequence[BaseTask]], Awaitable[Any]] = schedule_many,
    **settings: Any,
) -> Counts:
    """A backlog, from the start of a worker with 100 slots to the settlement of the last task."""
    with embedded_redis() as url:
        system = partial(
            TaskSystem,
            {task_class, NoOp},
            redis_url=url,
            scheduler=False,
            concurrency=100,
            settings={**_QUIET, **settings},
            task_db_url=None,
        )
        async with system(workers=0):
            await submit([task_class(number) for number in range(tasks)])
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


async def drain_delayed(tasks: int) -> Counts:
    """No-ops that were put aside and have become due, by one worker without a scheduler."""
    return await _drain(tasks, NoOp, _due_now)


async def drain_retried(tasks: int) -> Counts:
    """Tasks that fail once and are executed twice."""
    logging.disable()  # a line and a traceback for each of them
    try:
        return await _drain(tasks, Unlucky)
    finally:
        logging.disable(logging.NOTSET)


async def drain_group(tasks: int) -> Counts:
    """One callback group, its callback included."""
    return await _drain(tasks, NoOp, _in_a_group)


async def drain_behind_one_mutex(tasks: int) -> Counts:
    """Tasks of which one may run at a time: each is parked, granted its lock, and runs."""
    return await _drain(min(tasks, 200), Alone)


async def one_at_a_time(tasks: int) -> Counts:
    """Light load: each task is submitted when its predecessor has begun, which is settled meanwhile."""
    tasks = min(tasks, 200)
    async with TaskSystem([Bell], workers=1, scheduler=False, settings=_QUIET, task_db_url=None) as system:
        for number in range(-20, tasks):
            if number == 0:
                counting = AsyncExitStack()
                found = await counting.enter_async_context(counted(system.broker.redis, tasks))
            _rung.clear()
            await Bell(number).schedule()
            await _rung.wait()
        await counting.aclose()
    return found[0]


SCENARIOS: dict[str, Callable[[int], Awaitable[Counts]]] = {
    "enqueue one by one": one_by_one,
    "enqueue in bulk": in_bulk,
    "enqueue in bulk, delayed": in_bulk_for_later,
    "drain": drain,
    "drain, one mutex per task": drain_locked,
    "drain, results kept": drain_with_results,
    "drain, delayed": drain_delayed,
    "drain, failed once": drain_retried,
    "drain, a callback group": drain_group,
    "drain, one mutex for all": drain_behind_one_mutex,
    "one at a time": one_at_a_time,
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
