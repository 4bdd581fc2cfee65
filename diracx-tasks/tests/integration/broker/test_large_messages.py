"""Each call is limited in bytes and locks; the next calls process the rest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from diracx.tasks.plumbing import MutexLock
from diracx.tasks.plumbing.broker import RedisStreamBroker, groups, inspection, keys, locking, scripts
from diracx.tasks.plumbing.broker.cancel import TaskPlace
from diracx.tasks.plumbing.broker.models import Delivery, Settlement, Submission, TaskMessage
from diracx.tasks.plumbing.broker.redis_streams import PROMOTE_BATCH
from diracx.tasks.plumbing.broker.replies import ACCEPTED
from diracx.tasks.plumbing.broker.sizes import CALL_BYTES
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.worker.keeper import LeaseKeeper, PendingAck
from redis import Redis as SyncRedis
from redis.asyncio import Redis

QUEUE = "diracx:tasks:normal:medium"
NUMBER = 12
#: Four of them are more than one call takes.
LARGE = CALL_BYTES // 3

pytestmark = pytest.mark.leaves_keys("*")


@pytest.fixture
async def broker(redis_url: str) -> AsyncIterator[RedisStreamBroker]:
    broker = RedisStreamBroker(redis_url, consumer_name="worker")
    yield broker
    await broker.shutdown()


def messages(at_time: datetime | None = None) -> list[Submission]:
    return [
        Submission(TaskMessage(task_id=f"task-{n}", task_name="test:T", task_args=[b"x" * LARGE]), QUEUE, at_time)
        for n in range(NUMBER)
    ]


async def calls(redis: Redis) -> int:
    return int((await redis.info("commandstats")).get("cmdstat_evalsha", {"calls": 0})["calls"])


async def test_large_messages_that_are_due_are_moved_some_at_a_time(
    broker: RedisStreamBroker, redis: Redis
) -> None:
    await broker.submit(messages(datetime.now(UTC) - timedelta(seconds=1)))
    moved, *_, more, _ = await scripts.promote(redis, PROMOTE_BATCH)
    assert 1 <= moved <= 4
    assert more
    await broker.promote()
    assert await redis.xlen(QUEUE) == NUMBER


async def test_large_children_of_a_group_are_moved_some_at_a_time(broker: RedisStreamBroker, redis: Redis) -> None:
    fields = {"total": NUMBER, "callback": b"", "callback_name": "test:C", "callback_stream": QUEUE}
    await broker.submit_group("group", messages(), fields, 3600)
    assert await redis.xlen(QUEUE) == NUMBER
    assert (await groups.read_group(redis, "group")) is not None


@pytest.mark.parametrize("delayed", [True, False])
async def test_tasks_with_large_messages_are_cancelled_some_at_a_time(
    broker: RedisStreamBroker, redis: Redis, delayed: bool
) -> None:
    await broker.submit(messages(datetime.now(UTC) + timedelta(hours=1) if delayed else None))
    before = await calls(redis)
    places = await broker.cancel([f"task-{n}" for n in range(NUMBER)])
    assert set(places.values()) == {TaskPlace.DELAYED if delayed else TaskPlace.QUEUED}
    assert await calls(redis) - before > NUMBER / 4
    assert not await redis.exists(keys.DELAYED, keys.CANCELLED)
    assert not await redis.xlen(QUEUE)


async def test_the_beginnings_of_large_messages_are_read_some_at_a_time(
    broker: RedisStreamBroker, redis: Redis
) -> None:
    await broker.submit(messages())
    wanted = [(QUEUE, "-", "+", NUMBER - 2), ("diracx:tasks:no:such", "-", "+", 5), (QUEUE, "-", "+", 100)]
    first, none, last = await inspection.stream_heads(redis, wanted, 10)
    assert [len(first), len(none), len(last)] == [NUMBER - 2, 0, NUMBER]
    entries: Any = await redis.xrange(QUEUE)
    assert [entry for entry, *_ in last] == [entry.decode() for entry, _ in entries]
    assert all(length > LARGE for *_, length in last)
    await redis.delete(QUEUE)
    await broker.submit(messages(datetime.now(UTC) + timedelta(hours=1)))
    ids = [f"task-{n}" for n in range(NUMBER)]
    heads = await inspection.delayed_heads(redis, [*ids, "no such task"], 10)
    assert [head is not None and head[1] > LARGE for head in heads] == [True] * NUMBER + [False]


async def test_a_worker_reserves_few_messages_after_large_ones_and_many_again_after_small_ones(
    broker: RedisStreamBroker,
) -> None:
    await broker.submit(messages())
    assert len((await broker.fetch(5))[0]) == 5
    assert len((await broker.fetch(50))[0]) <= 3
    while (await broker.fetch(50))[0]:
        pass
    await broker.submit(
        [Submission(TaskMessage(task_id=f"small-{n}", task_name="test:T"), QUEUE) for n in range(500)]
    )
    got = [len((await broker.fetch(50))[0]) for _ in range(8)]
    assert got == sorted(got)
    assert got[-1] == 50


@pytest.mark.parametrize("lost", [True, False])
async def test_large_messages_of_a_lost_reply_or_of_a_dead_worker_all_come(
    broker: RedisStreamBroker, redis: Redis, redis_url: str, lost: bool
) -> None:
    await broker.submit(messages())
    await redis.xgroup_create(QUEUE, keys.GROUP, "0")
    await redis.xreadgroup(keys.GROUP, "worker", {QUEUE: ">"})
    if lost:
        assert len(await broker.fetch_unacknowledged([])) == NUMBER
        return
    other = RedisStreamBroker(redis_url, consumer_name="other")
    await other.reclaim(0, lease_seconds=600)
    await redis.zadd(keys.ALIVE, {"worker": 1})
    taken: list[Delivery] = []
    for _ in range(NUMBER):
        deliveries, again_seconds, _ = await other.reclaim(50, lease_seconds=600)
        assert len(deliveries) <= 4
        taken += deliveries
        if not again_seconds:
            continue
        break
    assert len(taken) == NUMBER
    await other.shutdown()


@pytest.mark.parametrize("loses", ["nothing", "everything before", "everything in between"])
async def test_a_large_renewal_is_sent_in_several_calls_and_renews_all_or_nothing(
    broker: RedisStreamBroker, redis: Redis, redis_url: str, loses: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = 600
    await broker.submit(
        [Submission(TaskMessage(task_id=f"task-{n}", task_name="test:T"), QUEUE) for n in range(number)]
    )
    deliveries: list[Delivery] = []
    while len(deliveries) < number:
        deliveries += (await broker.fetch(100))[0]
    locks = [MutexLock(JOB, n, ttl_ms=60_000) for n in range(number)]
    for lock in locks:
        assert await lock.acquire(redis)
    keeper = LeaseKeeper(redis_url, "worker", 600, asyncio.get_running_loop())
    await keeper.renew()
    holds = [PendingAck(each, [lock.spec()]) for each, lock in zip(deliveries, locks, strict=True)]
    keeper.add(holds)
    if loses == "everything before":
        await redis.flushdb()
    if loses == "everything in between":
        requested = []
        renew_batch = keeper.renew_batch

        def lose_then_renew(some: list[PendingAck], complete: bool) -> object:
            requested.append(len(some))
            if len(requested) == 2:
                with SyncRedis.from_url(redis_url) as sync:
                    sync.flushdb()
            return renew_batch(some, complete)

        monkeypatch.setattr(keeper, "renew_batch", lose_then_renew)
    for lock in locks:
        await redis.pexpire(lock.redis_key, 30_000)
    before = await calls(redis)
    await keeper.renew()
    assert await calls(redis) - before == (12 if loses == "everything in between" else 6)
    assert min([await redis.pttl(lock.redis_key) for lock in locks]) > 50_000
    settled = await broker.settle(
        [Settlement(each, locks=[lock.spec()]) for each, lock in zip(deliveries, locks, strict=True)],
        keeper.dataset_id,
    )
    assert settled == [ACCEPTED] * number
    keeper._redis.close()


async def test_locks_are_renewed_outside_of_workers_in_several_calls(redis: Redis) -> None:
    locks = [MutexLock(JOB, n, ttl_ms=60_000).spec() for n in range(600)]
    for lock in locks[:-1]:
        await redis.set(lock["key"], lock["owner"], px=20_000)
    before = await calls(redis)
    assert await locking.extend(redis, locks) == [True] * 599 + [False]
    assert await calls(redis) - before <= 3
    assert await redis.pttl(locks[0]["key"]) > 50_000
