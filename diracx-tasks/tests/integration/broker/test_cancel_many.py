"""Cancellation of many tasks in small batches; only their workers are notified."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import msgpack
import pytest
from diracx.tasks.plumbing import (
    BaseTask,
    ExponentialBackoff,
    MutexLock,
    TaskPlace,
    cancel_task,
    cancel_tasks,
    schedule_many,
    spawn_with_callback,
)
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.plumbing.broker.cancel import CANCEL_BATCH, FIND_BATCH
from diracx.tasks.plumbing.broker.models import submit_task
from diracx.tasks.plumbing.broker.worker_state import CANCELLED_CHANNEL
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.plumbing.worker.control_channel import ControlChannel
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from support.cancelled_tasks import TASKS, Gate, Hangs, failed_as_cancelled, nothing_is_left
from support.standard_tasks import SEEN, Echo
from support.waiting import until

pytestmark = pytest.mark.event_loops("asyncio", "uvloop")


@pytest.fixture(autouse=True)
def _close_gate() -> None:
    Gate.event = asyncio.Event()


async def test_unknown_ids_are_reported_and_leave_no_mark(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0) as system:
        task_id = await Echo(1).schedule()
        found = await cancel_tasks(["unknown", task_id, "x" * 300])
        assert found == {"unknown": TaskPlace.UNKNOWN, task_id: TaskPlace.QUEUED, "x" * 300: TaskPlace.UNKNOWN}
        assert not await redis.exists(keys.CANCELLED)
        assert await cancel_tasks([]) == {}
        del system


async def test_ids_of_any_length_are_found(redis_url: str) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0) as system:
        for length in (1, 15, 31, 32, 33, 255):
            task_id = await submit_task(system.broker, "test:Echo", task_id="i" * length)
            assert await cancel_task(task_id) is TaskPlace.QUEUED


async def test_a_task_is_not_confused_with_another_one_whose_id_is_in_its_arguments(
    redis_url: str, redis: Redis
) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0):
        gone = await Echo(1).schedule()
        watcher = await Echo(gone).schedule()
        assert await cancel_task(gone) is TaskPlace.QUEUED
        assert await cancel_task(gone) is TaskPlace.UNKNOWN
        assert await cancel_task(watcher) is TaskPlace.QUEUED


async def test_many_tasks_are_searched_together_in_small_batches(redis_url: str, redis: Redis) -> None:
    number = 40 * FIND_BATCH
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0):
        ids = []
        for _ in range(number // 2000):
            ids += await schedule_many([Echo("filler" * 20)] * 2000)
        wanted = [ids[0], ids[number // 2], *ids[-500:]]
        before = await redis.info("commandstats")
        found = await cancel_tasks(wanted)
        after = await redis.info("commandstats")
        assert set(found.values()) == {TaskPlace.QUEUED}
        calls = after["cmdstat_evalsha"]["calls"] - before["cmdstat_evalsha"]["calls"]
        # Never more than FIND_BATCH entries in one step; and one pass over the queue for all of them.
        assert number / FIND_BATCH <= calls < 100
        assert await redis.xlen("diracx:tasks:normal:medium") == number - len(wanted)
        assert not await redis.exists(keys.CANCELLED)
    await redis.delete("diracx:tasks:normal:medium")


async def test_of_many_that_are_cancelled_only_those_that_run_are_announced_and_to_their_worker_only(
    redis_url: str, redis: Redis
) -> None:
    settings = {"lease_seconds": 600}  # who only renewed his leases would hear of it after 200 s
    async with TaskSystem(
        [Hangs, Echo], redis_url=redis_url, workers=2, concurrency=300, settings=settings
    ) as system:
        running = set(await schedule_many([Hangs() for _ in range(500)]))
        await until(lambda: len(SEEN) == 500)
        later = datetime.now(UTC) + timedelta(hours=1)
        delayed = await schedule_many([Echo(number) for number in range(1000)], at_time=later)
        unknown = [f"unknown {number}" for number in range(2000)]
        async with redis.pubsub() as listener:
            await listener.psubscribe(keys.CANCELLED + "*")
            places = await system.broker.cancel([*unknown, *delayed, *running], result_ttl_seconds=60)
            await listener.ping()
            messages = []
            while (message := await listener.get_message(timeout=30)) and message["type"] != "pong":
                messages += [message] if message["type"] == "pmessage" else []
        for task_id in running:
            await failed_as_cancelled(system, task_id)
        await nothing_is_left(system)
    assert {task for task, place in places.items() if place is TaskPlace.RUNNING} == running
    announced = [(message["channel"], task) for message in messages for task in msgpack.unpackb(message["data"])]
    assert sorted(task for _, task in announced) == sorted(running), "each once, and no other"
    assert len({channel for channel, _ in announced}) == 2
    assert len(messages) <= 2 * (len(running) / CANCEL_BATCH + 1)


async def test_many_that_run_and_are_cancelled_together_end_a_few_at_a_time(redis_url: str) -> None:
    """So that their worker's event loop has time for others in between."""
    rounds, ends = 0, Counter[int]()

    async def count_rounds() -> None:
        nonlocal rounds
        while True:
            await asyncio.sleep(0)
            rounds += 1

    class Ends(Hangs):
        async def execute(self) -> None:
            try:
                await super().execute()
            finally:
                ends[rounds] += 1

    settings = {"lease_seconds": 600}
    async with TaskSystem([Ends], redis_url=redis_url, concurrency=500, settings=settings) as system:
        ids = await schedule_many([Ends() for _ in range(500)])
        await until(lambda: len(SEEN) == 500)
        counting = asyncio.create_task(count_rounds())
        await system.broker.cancel(ids)
        await until(lambda: ends.total() == 500)
        counting.cancel()
    assert max(ends.values()) <= 25


async def test_the_traffic_of_a_cancellation_is_linear_in_the_number_of_tasks(
    redis_url: str, redis: Redis
) -> None:
    """Independent of the length of the searched queue."""
    number = 3000
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0):
        await schedule_many([Echo(0)] * (5 * FIND_BATCH))
        before = await redis.info("stats")
        await cancel_tasks([f"unknown {number}" for number in range(number)])
        after = await redis.info("stats")
    sent = after["total_net_input_bytes"] - before["total_net_input_bytes"]
    assert sent < 500 * number
    await redis.delete("diracx:tasks:normal:medium")


async def test_any_number_of_cancelled_tasks_is_noted_in_one_pass(redis_url: str) -> None:
    """Ids that an older release announces one by one, as those that come in batches."""

    class Counted(dict[str, float]):
        looked_at = 0

        def __getitem__(self, key: str) -> float:
            Counted.looked_at += 1
            return super().__getitem__(key)

        def items(self) -> Any:
            Counted.looked_at += len(self)
            return super().items()

    channel = ControlChannel("worker", (), None)  # type: ignore[arg-type]  # nothing is delayed here
    channel.announced = Counted()
    ids = [f"task {number}" for number in range(20_000)]
    for first in range(0, 10_000, CANCEL_BATCH):
        channel.receive(b"those of this worker", msgpack.packb(ids[first : first + CANCEL_BATCH]))
    for task_id in ids[10_000:]:
        channel.receive(CANCELLED_CHANNEL.encode(), task_id.encode())
    assert Counted.looked_at < 2 * len(ids)
    assert all(channel.cancelled_since(0.0, task_id) for task_id in ids)


async def test_workers_without_cancellations_send_no_additional_commands(redis_url: str, redis: Redis) -> None:
    """The promise that cancellation costs tasks no round trip."""
    settings = {"housekeeping_seconds": 600, "lease_seconds": 600}
    async with TaskSystem([Echo], redis_url=redis_url, workers=1, scheduler=False, settings=settings) as system:
        await system.result(await Echo(0).schedule())
        before = await redis.info("commandstats")
        await asyncio.sleep(0.3)
        idle = await redis.info("commandstats")
        # At most the look that found nothing more and began to wait.
        assert idle["cmdstat_evalsha"]["calls"] - before["cmdstat_evalsha"]["calls"] <= 1
        for number in range(10):
            await system.result(await Echo(number).schedule())
        after = await redis.info("commandstats")
        # For each task: fetch, settle, and a look that finds nothing more to fetch.
        assert after["cmdstat_evalsha"]["calls"] - idle["cmdstat_evalsha"]["calls"] <= 3 * 10 + 2


# --- under load ------------------------------------------------------------------------------------------


@dataclass
class Mixed(BaseTask):
    """Tasks with and without locks, fast and slow, sometimes failing; record their end."""

    retry_policy = ExponentialBackoff(base_delay_seconds=0, max_retries=50)
    number: int

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(JOB, "contended")] if self.number % 3 == 0 else []

    async def execute(self) -> int:
        if self.number % 3 == 1:
            await asyncio.sleep(0.02)
        if self.number % 5 == 0 and Random().random() < 0.5:
            raise ValueError("again")
        await asyncio.sleep(0)
        SEEN.append(self.number)
        return self.number


async def test_a_task_that_moves_while_it_is_cancelled_ends_exactly_once(redis_url: str, redis: Redis) -> None:
    number = 400
    async with TaskSystem([Mixed, Echo], redis_url=redis_url, workers=2, concurrency=5, scheduler=True) as system:
        ids = await schedule_many([Mixed(n) for n in range(number)])
        grouped = await _grouped(redis, number)
        random = Random(1)
        found: dict[str, TaskPlace] = {}
        victims = random.sample(ids + grouped, number)
        for first in range(0, number, 8):
            batches = victims[first : first + 4], victims[first + 4 : first + 8]
            for places in await asyncio.gather(*(system.broker.cancel(b, result_ttl_seconds=60) for b in batches)):
                found |= places
        results = {task: await system.result(task, timeout=30) for task in ids + grouped}
        await until(lambda: "failure" in SEEN or "callback" in SEEN)
        await nothing_is_left(system)

    cancelled = {task for task, result in results.items() if result.is_err}
    assert all(result.error["type"] == "TaskCancelledError" for result in results.values() if result.error)
    for task, place in found.items():
        if place is TaskPlace.UNKNOWN:
            assert task not in cancelled, "what had ended has ended well"
        elif place is not TaskPlace.RUNNING:
            assert task in cancelled, f"it was {place}"
    assert cancelled <= set(found)
    assert len(set(found.values())) > 1, "they were in several places"
    ended_well = sorted(result.return_value for task, result in results.items() if task not in cancelled)
    assert sorted(value for value in SEEN if isinstance(value, int)) == ended_well
    fired = [value for value in SEEN if isinstance(value, str)]
    assert fired == (["failure"] if cancelled & set(grouped) else ["callback"])
    assert await redis.keys("diracx:groups*") == []


async def _grouped(redis: Redis, number: int) -> list[str]:
    """Submit so many tasks in a group; return their ids."""
    children = [Mixed(n) for n in range(number, 2 * number)]
    group = await spawn_with_callback(children, Echo("callback"), on_failure=Echo("failure"))
    return sorted(member.decode() for member in await redis.smembers(f"diracx:groups:{group}:pending"))
