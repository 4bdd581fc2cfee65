"""Leases: who counts as dead, and what that means for the tasks it had."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from diracx.tasks.plumbing import BaseTask, MutexLock
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys, worker_state
from diracx.tasks.plumbing.broker.models import Settlement, Submission, TaskMessage
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.plumbing.registry import TaskRegistry
from diracx.tasks.plumbing.worker.settings import WorkerSettings
from diracx.tasks.plumbing.worker.worker import Worker
from redis import Redis as SyncRedis
from redis.asyncio import Redis

BEGUN: list[int] = []


@dataclass
class Locked(BaseTask):
    number: int

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(JOB, self.number)]

    async def execute(self) -> None:
        BEGUN.append(self.number)
        await asyncio.sleep(0.1)


QUEUE = "diracx:tasks:normal:medium"
LEASE_MS = 30_000
ENDED = 1
"""A lease (ms since the epoch) that has ended long ago."""

pytestmark = pytest.mark.leaves_keys("diracx:tasks:*")


@pytest.fixture
async def workers(redis_url: str) -> AsyncIterator[tuple[RedisStreamBroker, RedisStreamBroker]]:
    pair = (
        RedisStreamBroker(redis_url, consumer_name="first"),
        RedisStreamBroker(redis_url, consumer_name="second"),
    )
    yield pair
    for broker in pair:
        await broker.shutdown()


def renew(broker: RedisStreamBroker, *deliveries: object) -> list[int]:
    entries = [{name: getattr(d, name) for name in ("stream", "entry", "deliveries")} for d in deliveries]
    with SyncRedis.from_url(broker.url) as redis:
        return worker_state.renew(redis, broker.consumer_name, LEASE_MS, entries, [])[0]


async def submit(broker: RedisStreamBroker) -> None:
    await broker.submit([Submission(TaskMessage(task_id="task", task_name="test:Task"), QUEUE)])


@pytest.mark.parametrize("comes_back", ["by a renewal", "by a settlement", "by both, twice"])
async def test_P9_a_worker_that_comes_back_has_not_died_of_its_task(
    workers: tuple[RedisStreamBroker, RedisStreamBroker], redis: Redis, comes_back: str
) -> None:
    """Two healthy workers whose network is cut in turn: nobody has died, and the task is no poison."""
    owner, other = workers
    await submit(owner)
    [delivery], _ = await owner.fetch(1)
    for _ in range(5):
        renew(other)
        await redis.zadd(keys.ALIVE, {owner.consumer_name: ENDED})
        [taken], *_ = await other.reclaim(1, max_deliveries=3)
        assert taken.deaths == 1
        for _ in range(2 if "twice" in comes_back else 1):
            if "settlement" not in comes_back:
                assert renew(owner, delivery) == [0], "the task is not its own any more"
            if "renewal" not in comes_back:
                assert await owner.settle([Settlement(delivery)]) == [False]
        owner, other, delivery = other, owner, taken


async def test_P9_workers_that_stay_away_have_died(
    workers: tuple[RedisStreamBroker, RedisStreamBroker], redis: Redis
) -> None:
    owner, other = workers
    await submit(owner)
    [delivery], _ = await owner.fetch(1)
    for deaths in range(1, 4):
        renew(other)
        await redis.zadd(keys.ALIVE, {owner.consumer_name: ENDED})
        [delivery], *_ = await other.reclaim(1, max_deliveries=3)
        assert delivery.deaths == deaths
        owner, other = other, owner


@pytest.mark.parametrize("first_call", ["a renewal", "a fetch", "a look for dead workers"])
async def test_when_all_leases_have_ended_the_server_was_away_and_nobody_is_dead(
    workers: tuple[RedisStreamBroker, RedisStreamBroker], redis: Redis, first_call: str
) -> None:
    first, second = workers
    await submit(first)
    [delivery], _ = await first.fetch(1)
    await redis.zadd(keys.ALIVE, {first.consumer_name: ENDED, second.consumer_name: ENDED + 1, "third": ENDED})
    if first_call == "a renewal":
        renew(second)
    elif first_call == "a fetch":
        await second.fetch(1, lease_seconds=LEASE_MS / 1000)
    assert (await second.reclaim(1))[0] == []
    assert await first.settle([Settlement(delivery)]) == [True], "it goes on, and has run once"
    now_ms = int((await redis.time())[0]) * 1000
    assert await redis.zcount(keys.ALIVE, now_ms, "+inf") == 3


@pytest.mark.parametrize(("part_left", "dead"), [(0.33, False), (0.6, True)])
async def test_a_server_that_was_away_until_some_leases_had_ended_takes_nobody_for_dead(
    workers: tuple[RedisStreamBroker, RedisStreamBroker], redis: Redis, part_left: float, dead: bool
) -> None:
    """Workers renew every third of a lease. What is left of the newest one tells whether any of them could."""
    first, second = workers
    await submit(first)
    [delivery], _ = await first.fetch(1)
    now_ms = int((await redis.time())[0]) * 1000
    ends = {first.consumer_name: now_ms - 1000, second.consumer_name: now_ms + part_left * LEASE_MS}
    await redis.zadd(keys.ALIVE, ends)
    taken, *_ = await second.reclaim(1, lease_seconds=LEASE_MS / 1000)
    assert [message.entry for message in taken] == ([delivery.entry] if dead else [])
    assert await first.settle([Settlement(delivery)]) == [not dead]


async def test_a_worker_that_has_signed_off_gets_no_other_term(
    workers: tuple[RedisStreamBroker, RedisStreamBroker], redis: Redis
) -> None:
    first, second = workers
    await submit(first)
    await first.fetch(1)
    assert not await first.leave(), "it still holds a message"
    renew(second)
    assert len((await second.reclaim(1))[0]) == 1


@pytest.mark.leaves_keys("lock:*")
async def test_fencing_tokens_rise_with_every_grant_even_after_a_loss_of_all_data(redis: Redis) -> None:
    tokens = []
    for round_ in range(4):
        lock = MutexLock(JOB, "x")
        assert lock.token is None
        assert await lock.acquire(redis)
        assert not await MutexLock(JOB, "x").acquire(redis)
        tokens.append(lock.token)
        await lock.release(redis)
        if round_ == 1:
            await redis.flushall()
    assert None not in tokens
    assert tokens == sorted(set(tokens)), "each is greater than the one before"


@pytest.mark.event_loops("asyncio", "uvloop")
async def test_what_needs_locks_begins_after_a_renewal_that_is_late_and_is_not_cut_off(
    redis_url: str, redis: Redis
) -> None:
    """After a failover the keeper may still wait for the old server, while the worker already asks the new one."""
    BEGUN.clear()
    settings = WorkerSettings(lease_seconds=1.0, max_deliveries=3, result_ttl_seconds=60)
    broker, stop = RedisStreamBroker(redis_url), asyncio.Event()
    worker = Worker(broker, TaskRegistry({"test:Locked": Locked}), settings=settings)
    running = asyncio.create_task(worker.run(stop))
    await worker.ready.wait()
    keeper = worker._keeper
    with keeper._renewing:  # no renewal comes through
        while not keeper.overdue:
            await asyncio.sleep(0.01)
        await broker.submit(
            [Submission(TaskMessage(task_id="late", task_name="test:Locked", task_args=[1]), QUEUE)]
        )
        await asyncio.sleep(0.5)
        assert BEGUN == []
    result = await broker.wait_result("late", timeout=20)
    assert (result.is_err, BEGUN) == (False, [1])
    stop.set()
    await running
    await broker.shutdown()
