"""Cancelling a task, wherever it is; and that nothing of it stays behind."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import msgpack
import pytest
from diracx.tasks.plumbing import (
    BaseTask,
    ConcurrencyLimiter,
    ExponentialBackoff,
    MutexLock,
    RateLimiter,
    TaskPlace,
    cancel_task,
    cancel_tasks,
    schedule_many,
    spawn_with_callback,
)
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys, scripts
from diracx.tasks.plumbing.broker.cancel import CANCEL_BATCH, FIND_BATCH
from diracx.tasks.plumbing.broker.models import Settlement, submit_task
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.plumbing.worker.control_channel import ControlChannel
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis

pytestmark = pytest.mark.event_loops("asyncio", "uvloop")

seen: list[Any] = []


class Gate:
    """Event that tasks wait for; a new one for each test and its event loop."""

    event: asyncio.Event


@pytest.fixture(autouse=True)
def _forget() -> None:
    Gate.event = asyncio.Event()
    seen.clear()


@dataclass
class Echo(BaseTask):
    value: Any = None

    async def execute(self) -> Any:
        seen.append(self.value)
        return self.value


@dataclass
class Hangs(BaseTask):
    """Never ends by itself, would be retried for ever, and belongs among the dead letters."""

    retry_policy = ExponentialBackoff(base_delay_seconds=0, max_retries=100)
    dlq_eligible = True

    async def execute(self) -> None:
        seen.append("begun")
        try:
            await Gate.event.wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise


@dataclass
class Locked(BaseTask):
    number: int

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(JOB, "contended")]

    async def execute(self) -> int:
        seen.append(self.number)
        if self.number == 0:
            await Gate.event.wait()
        return self.number


class Fails(BaseTask):
    retry_policy = ExponentialBackoff(base_delay_seconds=3600, max_retries=3)
    dlq_eligible = True

    async def execute(self) -> None:
        seen.append("attempt")
        raise ValueError("no")


class Scarce(RateLimiter):
    limit = 1
    window_seconds = 600.0


class Limited(BaseTask):
    @property
    def execution_locks(self) -> list[BaseLock]:
        return [Scarce(JOB, "scarce")]

    async def execute(self) -> None:
        seen.append("limited")


TASKS = [Echo, Hangs, Locked, Fails, Limited]


async def until(condition: Callable[[], Awaitable[Any] | Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        met = condition()
        if await met if isinstance(met, Awaitable) else met:
            return
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.005)


async def failed_as_cancelled(system: TaskSystem, task_id: str) -> None:
    result = await system.result(task_id)
    assert result.error is not None
    assert result.error["type"] == "TaskCancelledError"


async def nothing_is_left(system: TaskSystem) -> None:
    await system.drain()
    assert not await system.broker.redis.exists(keys.CANCELLED, keys.DELAYED, keys.DELAYED_DATA)
    assert system.task_db is not None
    async with system.task_db as db:
        assert await db.search() == [], "a cancelled task is no dead letter"


async def test_a_queued_task_is_gone_at_once_and_never_runs(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0) as system:
        ids = await schedule_many([Echo(number) for number in range(5)], labels={"result_ttl_seconds": 60})
        assert await cancel_task(ids[2]) is TaskPlace.QUEUED
        assert await redis.xlen("diracx:tasks:normal:medium") == 4
        await failed_as_cancelled(system, ids[2])
        assert await cancel_task(ids[2]) is TaskPlace.UNKNOWN
        await nothing_is_left_but_the_queue(redis)
    async with TaskSystem(TASKS, redis_url=redis_url) as system:
        await nothing_is_left(system)
    assert seen == [0, 1, 3, 4]


async def nothing_is_left_but_the_queue(redis: Redis) -> None:
    assert not await redis.exists(keys.CANCELLED)


async def test_a_delayed_task_is_gone_at_once(redis_url: str) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url) as system:
        task_id = await Echo(1).schedule(at_time=datetime.now(UTC) + timedelta(hours=1))
        assert await system.cancel(task_id) is TaskPlace.DELAYED
        await failed_as_cancelled(system, task_id)
        await nothing_is_left(system)
    assert seen == []


async def test_a_task_between_two_attempts_is_not_tried_again(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url) as system:
        task_id = await Fails().schedule()
        await until(lambda: redis.exists(keys.DELAYED))
        assert await system.cancel(task_id) is TaskPlace.RETRYING
        await failed_as_cancelled(system, task_id)
        await nothing_is_left(system)
    assert seen == ["attempt"]


async def test_a_task_that_waits_for_a_lock_is_gone_and_the_next_in_line_gets_it(
    redis_url: str, redis: Redis
) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url) as system:
        holder = await Locked(0).schedule()
        await until(lambda: 0 in seen)
        waiting = [await Locked(number).schedule() for number in range(1, 4)]
        await until(lambda: _is(redis.zcard(keys.DELAYED), 3))
        assert await system.cancel(waiting[0]) is TaskPlace.WAITING
        await failed_as_cancelled(system, waiting[0])
        Gate.event.set()
        assert (await system.result(holder)).return_value == 0
        await nothing_is_left(system)
    assert seen[0] == 0
    assert sorted(seen) == [0, 2, 3]


async def test_a_task_that_waits_for_quota_is_gone(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url) as system:
        await schedule_many([Limited()])
        await until(lambda: "limited" in seen)
        task_id = await Limited().schedule()
        await until(lambda: redis.exists(keys.DELAYED))
        assert await system.cancel(task_id) is TaskPlace.WAITING
        await nothing_is_left(system)
    assert seen == ["limited"]


async def _is(call: Any, value: Any) -> bool:
    return bool(await call == value)


async def test_a_running_task_is_cancelled_within_a_second_and_not_retried(redis_url: str, redis: Redis) -> None:
    # Who only renewed his leases would hear of it after 200 s.
    async with TaskSystem(TASKS, redis_url=redis_url, workers=2, settings={"lease_seconds": 600}) as system:
        task_id, other = await Hangs().schedule(), await Hangs().schedule()
        await until(lambda: seen.count("begun") == 2)
        asked = time.monotonic()
        assert await system.cancel(task_id) is TaskPlace.RUNNING
        await failed_as_cancelled(system, task_id)
        assert time.monotonic() - asked < 10.0, "a second, and what a busy machine needs"
        assert seen == ["begun", "begun", "cancelled"]
        Gate.event.set()
        assert not (await system.result(other)).is_err
        await nothing_is_left(system)


async def test_a_cancelled_execution_gives_its_locks_back(redis_url: str) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url) as system:
        holder = await Locked(0).schedule()
        await until(lambda: 0 in seen)
        following = await Locked(1).schedule()
        assert await system.cancel(holder) is TaskPlace.RUNNING
        assert (await system.result(following)).return_value == 1
        await nothing_is_left(system)


async def mark(redis: Redis, task_id: str) -> None:
    """As cancel.lua leaves it, but announced to nobody."""
    await redis.zadd(keys.CANCELLED, {task_id: (time.time() + 60) * 1000})
    await redis.set(keys.ANY_CANCELLED, 1, px=60_000)


async def test_a_worker_that_did_not_hear_finds_the_mark_with_its_next_renewal(
    redis_url: str, redis: Redis
) -> None:
    settings = {"lease_seconds": 0.6}
    async with TaskSystem(TASKS, redis_url=redis_url, settings=settings) as system:
        task_id = await Hangs().schedule()
        await until(lambda: "begun" in seen)
        await mark(redis, task_id)
        await failed_as_cancelled(system, task_id)
        await nothing_is_left(system)


async def test_a_lost_connection_is_made_again(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=1) as system:
        await redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        await until(lambda: _subscribers(redis))
        task_id = await Hangs().schedule()
        await until(lambda: "begun" in seen)
        await system.cancel(task_id)
        await failed_as_cancelled(system, task_id)
        await nothing_is_left(system)


async def _subscribers(redis: Redis) -> bool:
    [(_, count)] = await redis.pubsub_numsub(keys.CANCELLED)
    return bool(count)


@pytest.mark.leaves_keys("diracx:tasks:alive", "diracx:tasks:leases")  # the dead one may not be off the list yet
async def test_a_task_marked_as_cancelled_is_dropped_when_it_is_fetched(redis_url: str, redis: Redis) -> None:
    """The worker that had it died, or it came back to the queue just before it was found."""
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0) as system:
        first, second, third = await schedule_many([Echo(1), Locked(2), Echo(3)])
        dead = RedisStreamBroker(redis_url, consumer_name="dead")
        [delivery], _ = await dead.fetch(1)
        assert not delivery.cancelled
        await redis.zadd(keys.ALIVE, {"dead": 0})
        assert await cancel_tasks([first]) == {first: TaskPlace.RUNNING}
        await dead.shutdown()
        await mark(redis, second)
    async with TaskSystem(TASKS, redis_url=redis_url) as system:
        for task_id in (first, second):
            await failed_as_cancelled(system, task_id)
        assert (await system.result(third)).return_value == 3
        await nothing_is_left(system)
    assert seen == [3]


async def test_a_task_that_ended_before_it_could_be_cancelled_leaves_no_mark(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0) as system:
        task_id = await Echo(1).schedule()
        [delivery], _ = await system.broker.fetch(1)
        assert await cancel_task(task_id) is TaskPlace.RUNNING
        assert await redis.zscore(keys.CANCELLED, task_id)
        assert 0 < await redis.ttl(keys.CANCELLED) <= 604_800
        assert await system.broker.settle([Settlement(delivery)]) == [True]
        assert not await redis.exists(keys.CANCELLED)
        await system.broker.leave()


class OneSlot(ConcurrencyLimiter):
    limit = 1


@dataclass
class Slotted(Locked):
    @property
    def execution_locks(self) -> list[BaseLock]:
        return [OneSlot(JOB, "contended")]


@pytest.mark.parametrize("kind", [Locked, Slotted])
@pytest.mark.parametrize("by_a_worker", [False, True])
async def test_a_cancelled_task_passes_its_granted_lock_to_the_next(
    redis_url: str, redis: Redis, kind: type[Locked], by_a_worker: bool
) -> None:
    [held] = kind(0).execution_locks
    assert await held.acquire(redis)
    # The timers are far away: only a grant can resume a task.
    settings = {"lock_retry_seconds": 3600}
    async with TaskSystem([kind], redis_url=redis_url, settings=settings) as system:
        first = await kind(1).schedule()
        await until(lambda: _is(redis.zcard(keys.DELAYED), 1))
        second = await kind(2).schedule()
        await until(lambda: _is(redis.zcard(keys.DELAYED), 2))
    async with TaskSystem([kind], redis_url=redis_url, workers=0) as system:
        await held.release(redis)
        if by_a_worker:
            await mark(redis, first)
        else:
            assert await system.cancel(first) is TaskPlace.QUEUED
    async with TaskSystem([kind], redis_url=redis_url, settings=settings) as system:
        await failed_as_cancelled(system, first)
        assert (await system.result(second)).return_value == 2
        await nothing_is_left(system)


async def test_P33_a_cancelled_child_has_failed_for_its_group(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0):
        await spawn_with_callback(
            [Echo("child"), Hangs(), Echo("queued")], Echo("callback"), on_failure=Echo("failure")
        )
        [_, (_, hangs), (_, queued)] = await redis.xrange("diracx:tasks:normal:medium")
        assert await cancel_task(_id_of(queued[b"data"])) is TaskPlace.QUEUED
    async with TaskSystem(TASKS, redis_url=redis_url) as system:
        await until(lambda: "begun" in seen)
        assert await system.cancel(_id_of(hangs[b"data"])) is TaskPlace.RUNNING
        await nothing_is_left(system)
    assert seen == ["child", "begun", "cancelled", "failure"]
    assert await redis.keys("diracx:groups*") == []


def _id_of(data: bytes) -> str:
    from diracx.tasks.plumbing.broker.models import TaskMessage

    return TaskMessage.loadb(data).task_id


async def test_the_child_of_a_large_group_can_be_cancelled_on_its_way_to_the_queue(
    redis_url: str, redis: Redis
) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0) as system:
        child = {"task": "the-child", "staged": b"diracx:tasks:normal:medium\n" + _message("the-child")}
        fields = {"total": 1, "ttl_ms": 60_000, "callback_name": "test:Echo"}
        fields |= {"callback_stream": "diracx:tasks:normal:medium", "callback": _message("the-callback")}
        await scripts.group(redis, "the-group", fields, [], last=False)
        await scripts.group(redis, "the-group", None, [child], last=True)
        assert await redis.exists(keys.GROUP_OUTBOX)
        assert await system.cancel("the-child") is TaskPlace.QUEUED
        await failed_as_cancelled(system, "the-child")


def _message(task_id: str) -> bytes:
    from diracx.tasks.plumbing.broker.labels import LABEL_GROUP
    from diracx.tasks.plumbing.broker.models import TaskMessage

    return TaskMessage(task_id=task_id, task_name="test:Echo", labels={LABEL_GROUP: "the-group"}).dumpb()


async def test_unknown_ids_are_said_to_be_unknown_and_leave_no_mark(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0) as system:
        task_id = await Echo(1).schedule()
        found = await cancel_tasks(["nobody", task_id, "x" * 300])
        assert found == {"nobody": TaskPlace.UNKNOWN, task_id: TaskPlace.QUEUED, "x" * 300: TaskPlace.UNKNOWN}
        assert not await redis.exists(keys.CANCELLED)
        assert await cancel_tasks([]) == {}
        del system


async def test_ids_of_any_length_are_found(redis_url: str) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0) as system:
        for length in (1, 15, 31, 32, 33, 255):
            task_id = await submit_task(system.broker, "test:Echo", task_id="i" * length)
            assert await cancel_task(task_id) is TaskPlace.QUEUED


async def test_a_task_is_not_taken_for_another_that_it_only_speaks_of(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0):
        gone = await Echo(1).schedule()
        watcher = await Echo(gone).schedule()
        assert await cancel_task(gone) is TaskPlace.QUEUED
        assert await cancel_task(gone) is TaskPlace.UNKNOWN
        assert await cancel_task(watcher) is TaskPlace.QUEUED


async def test_many_are_looked_for_together_in_small_steps(redis_url: str, redis: Redis) -> None:
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
        await until(lambda: len(seen) == 500)
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
        await until(lambda: len(seen) == 500)
        counting = asyncio.create_task(count_rounds())
        await system.broker.cancel(ids)
        await until(lambda: ends.total() == 500)
        counting.cancel()
    assert max(ends.values()) <= 25


async def test_what_a_cancellation_sends_grows_no_faster_than_the_number_of_tasks(
    redis_url: str, redis: Redis
) -> None:
    """However long the queue is that is looked through."""
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
    channel._heard = Counted()
    ids = [f"task {number}" for number in range(20_000)]
    for first in range(0, 10_000, CANCEL_BATCH):
        channel._hear(set(ids[first : first + CANCEL_BATCH]))
    for task_id in ids[10_000:]:
        channel._hear({task_id})
    assert Counted.looked_at < 2 * len(ids)
    assert all(channel.cancelled_since(0.0, task_id) for task_id in ids)


async def test_what_runs_on_after_the_server_lost_its_data_can_be_cancelled(redis_url: str, redis: Redis) -> None:
    settings = {"lease_seconds": 0.6}
    async with TaskSystem(TASKS, redis_url=redis_url, workers=2, settings=settings) as system:
        task_id = await Hangs().schedule()
        await until(lambda: "begun" in seen)
        await redis.flushall()
        await until(lambda: _is_noted(redis))
        assert await system.cancel(task_id) is TaskPlace.UNKNOWN
        await until(lambda: "cancelled" in seen)
        await nothing_is_left(system)


async def _is_noted(redis: Redis) -> bool:
    records = await redis.keys(keys.HELD_PREFIX + "*")
    fields = [field for record in records for field in await redis.hkeys(record)]
    return any(field.startswith(b"entry:") for field in fields)


async def test_workers_that_have_nothing_to_cancel_ask_for_nothing_more(redis_url: str, redis: Redis) -> None:
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
    """Locked or not, quick or not, failing now and then; says when it has run to its end."""

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
        seen.append(self.number)
        return self.number


async def test_whatever_moves_while_it_is_cancelled_ends_exactly_once(redis_url: str, redis: Redis) -> None:
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
        await until(lambda: "failure" in seen or "callback" in seen)
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
    assert sorted(value for value in seen if isinstance(value, int)) == ended_well
    fired = [value for value in seen if isinstance(value, str)]
    assert fired == (["failure"] if cancelled & set(grouped) else ["callback"])
    assert await redis.keys("diracx:groups*") == []


async def _grouped(redis: Redis, number: int) -> list[str]:
    """As many tasks in a group; their ids."""
    children = [Mixed(n) for n in range(number, 2 * number)]
    group = await spawn_with_callback(children, Echo("callback"), on_failure=Echo("failure"))
    return sorted(member.decode() for member in await redis.smembers(f"diracx:groups:{group}:pending"))
