"""Fetching of messages: immediately when idle, never more than can be started."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.broker.models import Settlement
from diracx.tasks.plumbing.broker.replies import ACCEPTED
from diracx.tasks.plumbing.worker.intake import Intake
from diracx.tasks.plumbing.worker.keeper import LeaseKeeper
from diracx.tasks.plumbing.worker.settings import WorkerSettings
from diracx.tasks.plumbing.worker.unread import UnreadGuard
from redis import Redis as SyncRedis
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from support.intakes import NORMAL, REALTIME, SaysOnce, in_hand, intake_of, name_of, submission
from support.leased_deliveries import LeasedDeliveries
from support.waiting import clients_wait, eventually

# What is in hand, or still queued, when the test ends.
pytestmark = [pytest.mark.leaves_keys("diracx:tasks:*"), pytest.mark.event_loops("asyncio", "uvloop")]


@pytest.fixture
def sync(redis_url: str) -> Iterator[SyncRedis]:
    with SyncRedis.from_url(redis_url) as redis:
        yield redis


async def evaluations(redis: Redis) -> int:
    stats = await redis.info("commandstats")
    return int(stats.get("cmdstat_evalsha", {"calls": 0})["calls"])


class CountsLooks(RedisStreamBroker):
    """Counts its checks for dead workers, with and without an audit."""

    looks: Counter[bool]

    async def reclaim(self, free: int, *, audit: bool = False, **options: Any) -> Any:
        self.looks[audit] += 1
        return await super().reclaim(free, audit=audit, **options)


@pytest.mark.parametrize("quiet", [True, False])
async def test_a_worker_checks_for_dead_workers_only_when_a_lease_may_have_expired(
    redis_url: str, quiet: bool
) -> None:
    broker = CountsLooks(redis_url)
    broker.looks = Counter()
    intake = intake_of(broker, lease_seconds=1.1, quiet_until=time.monotonic() + 60 if quiet else 0.0)
    while broker.looks[True] < 2:
        assert await intake.next(10) == []
    assert (broker.looks[False] == 0) == quiet
    await broker.shutdown()


async def test_deliveries_of_dead_workers_are_recovered_regardless_of_renewals(
    redis_url: str, redis: Redis
) -> None:
    """A worker that signs off or is taken for dead leaves before its lease would have ended."""
    broker = CountsLooks(redis_url)
    broker.looks = Counter()
    intake = intake_of(broker, quiet_until=time.monotonic() + 60)
    gone = RedisStreamBroker(redis_url)
    await broker.submit([submission(str(number)) for number in range(3)])
    assert len((await gone.fetch(3, lease_seconds=30))[0]) == 3
    assert not await gone.leave()
    for _ in range(3):
        assert len(await intake.next(1)) == 1
    for each in (broker, gone):
        await each.shutdown()


async def test_an_idle_worker_receives_new_tasks_without_polling(broker: RedisStreamBroker, redis: Redis) -> None:
    intake = intake_of(broker)
    fetching = asyncio.create_task(intake.next(10))
    await clients_wait(redis)
    before = await evaluations(redis)
    await broker.submit([submission("one")])
    [delivery] = await fetching
    assert await broker.settle([Settlement(delivery)]) == [ACCEPTED]
    fetching = asyncio.create_task(intake.next(10))
    await clients_wait(redis)
    await broker.submit([submission("two")])
    assert len(await fetching) == 1
    # No step hands a message out; one settles the first.
    assert await evaluations(redis) - before == 1


async def test_an_idle_worker_receives_the_most_urgent_new_task(broker: RedisStreamBroker, redis: Redis) -> None:
    fetching = asyncio.create_task(intake_of(broker).next(1))
    await clients_wait(redis)
    async with redis.pipeline(transaction=True) as pipe:
        for each in (submission("later"), submission("now", REALTIME)):
            pipe.xadd(each.stream, {"data": each.message.dumpb()})
        await pipe.execute()
    [delivery] = await fetching
    assert delivery.stream == REALTIME


async def test_tasks_beyond_the_slots_of_a_waiting_worker_stay_in_the_queue(
    broker: RedisStreamBroker, redis: Redis
) -> None:
    """A waiting worker gets some tasks of each stream; those that cannot start are returned."""
    streams = [keys.stream_name_for(priority, "medium") for priority in ("realtime", "normal", "background")]
    for free in (1, 2, 3, 10):
        await redis.flushall()
        fetching = asyncio.create_task(intake_of(broker).next(free))
        await clients_wait(redis)
        async with redis.pipeline(transaction=True) as pipe:
            for each in streams[::-1]:
                pipe.xadd(each, {"data": submission(each).message.dumpb()})
            await pipe.execute()
        deliveries = await fetching
        assert [each.stream for each in deliveries] == streams[:free]
        other = RedisStreamBroker(broker.url)
        rest, _ = await other.fetch(10)
        assert [name_of(each) for each in rest] == streams[free:]
        await other.shutdown()


async def test_waiting_workers_get_one_message_each_in_turn(redis_url: str, redis: Redis) -> None:
    brokers = [RedisStreamBroker(redis_url, consumer_name=str(number)) for number in range(4)]
    fetches = []
    for number, each in enumerate(brokers):
        fetches.append(asyncio.create_task(intake_of(each).next(10)))
        await clients_wait(redis, number + 1)
    for waiting in fetches:
        # As the published package submits: it notifies no worker.
        await redis.xadd(NORMAL, {"data": submission("one").message.dumpb()})
        assert len(await waiting) == 1, "who has waited longest"
        assert await in_hand(redis) == sum(each.done() for each in fetches)
    for each in brokers:
        await each.shutdown()


async def test_a_waiting_worker_recognises_a_cancelled_task(broker: RedisStreamBroker, redis: Redis) -> None:
    fetching = asyncio.create_task(intake_of(broker).next(10))
    await clients_wait(redis)
    await redis.zadd(keys.CANCELLED, {"one": (time.time() + 60) * 1000})
    async with redis.pipeline(transaction=True) as pipe:
        for each in (submission("one"), submission("other", REALTIME)):
            pipe.xadd(each.stream, {"data": each.message.dumpb()})
        await pipe.execute()
    assert {name_of(each): each.cancelled for each in await fetching} == {"one": True, "other": False}
    await redis.delete(keys.CANCELLED)


@pytest.mark.parametrize("idle", [True, False])
@pytest.mark.parametrize("command", ["FLUSHALL", f"DEL {NORMAL}", f"XGROUP DESTROY {NORMAL} {keys.GROUP}"])
async def test_streams_deleted_while_a_worker_waits_are_created_again(
    broker: RedisStreamBroker, redis: Redis, command: str, idle: bool
) -> None:
    intake = intake_of(broker, idle=idle)
    fetching = asyncio.create_task(intake.next(10))
    await clients_wait(redis)
    await redis.execute_command(*command.split())
    await broker.submit([submission("one")])
    deliveries = await fetching
    while not deliveries:
        deliveries = await intake.next(10)
    assert [name_of(each) for each in deliveries] == ["one"]


async def test_many_short_tasks_that_come_together_are_fetched_together(
    broker: RedisStreamBroker, redis: Redis
) -> None:
    intake = intake_of(broker)
    fetching = asyncio.create_task(intake.next(100))
    await clients_wait(redis)
    await broker.submit([submission(str(number)) for number in range(200)])
    taken, calls = await fetching, 1
    while len(taken) < 200:
        taken += await intake.next(100)
        calls += 1
    assert calls <= 8


@pytest.fixture
async def busy(broker: RedisStreamBroker) -> AsyncIterator[tuple[Intake, UnreadGuard]]:
    """Intake and guard of a worker that runs something."""
    loop = asyncio.get_running_loop()
    async with LeaseKeeper(broker.url, broker.consumer_name, 30, loop) as keeper:
        guard = UnreadGuard(loop, lambda: keeper.requeue_unread(broker.streams))
        settings = WorkerSettings()
        yield Intake(broker, settings, asyncio.Event(), keeper, ("a task",), guard), guard
        await asyncio.to_thread(guard.close)


async def test_a_busy_worker_receives_new_tasks(
    broker: RedisStreamBroker, redis: Redis, busy: tuple[Intake, UnreadGuard]
) -> None:
    intake, _ = busy
    at_once = 0
    for number in range(20):
        fetching = asyncio.create_task(intake.next(10))
        await clients_wait(redis)
        before = await evaluations(redis)
        await broker.submit([submission(str(number))])
        deliveries = await fetching
        at_once += bool(deliveries) and await evaluations(redis) == before
        while not deliveries:  # a busy machine may hold up the event loop, too
            deliveries = await intake.next(10)
        assert [each.deliveries for each in deliveries] == [1]
        assert await broker.settle([Settlement(each) for each in deliveries]) == [ACCEPTED]
    assert at_once > 10, "it does not have to ask again"


@pytest.mark.parametrize("large", [False, True])
async def test_tasks_received_while_a_task_blocks_the_event_loop_are_returned(
    redis_url: str,
    broker: RedisStreamBroker,
    redis: Redis,
    busy: tuple[Intake, UnreadGuard],
    sync: SyncRedis,
    large: bool,
) -> None:
    intake, _ = busy
    message = submission("one").message
    message.task_kwargs = {"value": "x" * (3_000_000 if large else 3)}
    sync.zadd(keys.CANCELLED, {"another": 2**52})
    fetching = asyncio.create_task(intake.next(10))
    await clients_wait(redis)
    occurrence = {"since": "17", "occurrence": "61"}
    sync.xadd(REALTIME, {"data": message.dumpb(), **occurrence})
    sync.xadd(NORMAL, {"data": submission("two").message.dumpb()})
    eventually(lambda: sync.xlen(REALTIME + keys.RESUMED_SUFFIX))  # the event loop is blocked all the time
    moved = sync.xrange(REALTIME + keys.RESUMED_SUFFIX)
    assert sync.xlen(REALTIME) == 0
    assert {name.decode(): value.decode() for name, value in moved[0][1].items() if name != b"data"} == occurrence
    assert await fetching == []
    other = RedisStreamBroker(redis_url)
    first, second = (await other.fetch(10))[0]
    assert [name_of(first), name_of(second)] == ["one", "two"]
    assert (first.deliveries, first.since) == (1, "17")
    assert await other.settle([Settlement(first), Settlement(second)]) == [ACCEPTED, ACCEPTED]
    await other.shutdown()
    fetching = asyncio.create_task(intake.next(10))
    await clients_wait(redis)
    await broker.submit([submission("three")])
    assert [name_of(each) for each in await fetching] == ["three"], "it is given what comes as before"
    sync.delete(keys.CANCELLED)


async def test_tasks_that_cannot_be_returned_are_recovered_when_the_event_loop_continues(
    broker: RedisStreamBroker, redis: Redis, sync: SyncRedis
) -> None:
    tried: list[float] = []

    def fails() -> None:
        tried.append(time.monotonic())
        raise RedisConnectionError("the server is away")

    guard = UnreadGuard(asyncio.get_running_loop(), fails)
    intake = Intake(broker, WorkerSettings(), asyncio.Event(), LeasedDeliveries(), ("a task",), guard)
    fetching = asyncio.create_task(intake.next(10))
    await clients_wait(redis)
    sync.xadd(NORMAL, {"data": submission("one").message.dumpb()})
    eventually(lambda: tried)
    [delivery] = await fetching
    assert (name_of(delivery), delivery.deliveries) == ("one", 1)
    await asyncio.to_thread(guard.close)


@pytest.mark.parametrize("idle", [True, False])
async def test_tasks_received_while_a_worker_stops_are_delivered_or_stay_in_the_queue(
    broker: RedisStreamBroker, redis: Redis, idle: bool
) -> None:
    for number in range(20):
        await redis.flushall()
        stop = asyncio.Event()
        intake = intake_of(broker, stop, idle=idle)
        fetching = asyncio.create_task(intake.next(10))
        await clients_wait(redis)
        submitting = asyncio.create_task(broker.submit([submission(str(number))]))
        for _ in range(number % 10):
            await asyncio.sleep(0)
        stop.set()
        await fetching
        await intake.close()
        deliveries = await intake.fetch_unacknowledged()
        await submitting
        assert await in_hand(redis) == len(deliveries)


async def test_an_ended_wait_and_one_that_arrives_later_get_no_task(
    broker: RedisStreamBroker, redis: Redis
) -> None:
    assert (await broker.fetch(10))[0] == []
    for _ in range(20):
        fetching = asyncio.create_task(broker.reserve_next(10, timeout=60))
        await clients_wait(redis)
        await broker.end_wait()
        await broker.submit([submission("one")])
        for late in (fetching, broker.reserve_next(10, timeout=60)):
            with pytest.raises(ResponseError, match=r"^(NOGROUP|UNBLOCKED)"):
                await late
        assert await in_hand(redis) == 0
        [delivery] = (await broker.fetch(10))[0]
        assert await broker.settle([Settlement(delivery)]) == [ACCEPTED]
        assert (await broker.fetch(10))[0] == []


async def test_flushed_scripts_are_loaded_again_while_a_worker_waits(
    broker: RedisStreamBroker, redis: Redis
) -> None:
    fetching = asyncio.create_task(intake_of(broker).next(10))
    await clients_wait(redis)
    await redis.script_flush()
    await broker.submit([submission("one")])
    assert len(await fetching) == 1


@pytest.mark.parametrize("idle", [True, False])
async def test_a_wait_is_over_before_the_connection_gives_up_on_its_reply(redis_url: str, idle: bool) -> None:
    broker = SaysOnce(redis_url, socket_timeout=4.0)
    assert await intake_of(broker, idle=idle).next(10) == [], "and no timeout"
    await broker.shutdown()
