"""Data of the published package 0.7 in Redis; test_migration.py runs the package itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import msgpack
import pytest
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys, published, scheduling
from diracx.tasks.plumbing.broker.models import Submission, TaskMessage
from diracx.tasks.plumbing.broker.server_check import Role, UnusableServerError
from redis.asyncio import Redis

QUEUE = "diracx:tasks:normal:medium"
FIELDS = ("task_id", "task_name", "labels", "task_args", "task_kwargs", "trace_context")


def message(task_id: str, labels: dict[str, Any] | None = None, args: tuple[Any, ...] = ()) -> bytes:
    """A message as 0.7 writes it."""
    values = (task_id, "test:T", labels or {}, list(args), {}, {})
    return bytes(msgpack.packb(dict(zip(FIELDS, values, strict=True)), datetime=True))


@pytest.fixture
async def broker(redis_url: str) -> AsyncIterator[RedisStreamBroker]:
    broker = RedisStreamBroker(redis_url, worker_size="medium")
    yield broker
    await broker.shutdown()


async def queued(redis: Redis, stream: str = QUEUE) -> list[bytes]:
    return [fields[b"data"] for _, fields in await redis.xrange(stream)]


async def test_a_delayed_message_of_0_7_is_queued_when_it_is_due(redis: Redis, broker: RedisStreamBroker) -> None:
    data = message("due", {"priority": "realtime", "size": "small"}, (datetime.now(UTC), b"\xff", "text"))
    await redis.zadd(keys.DELAYED, {data: time.time() - 1})
    await broker.promote()
    assert await queued(redis, "diracx:tasks:realtime:small") == [data]
    assert not await redis.exists(keys.DELAYED)
    await redis.delete("diracx:tasks:realtime:small")


async def test_a_delayed_message_of_0_7_waits_for_its_due_time_like_a_new_one(
    redis: Redis, broker: RedisStreamBroker
) -> None:
    due = time.time() + 1
    first, second = message("first", {"_retry_attempt": 2}), message("second")
    await redis.zadd(keys.DELAYED, {first: due, second: due + 3600})
    await broker.promote()
    assert await redis.zmscore(keys.DELAYED, ["first", "second"]) == [
        pytest.approx(due * 1000, abs=1),
        pytest.approx((due + 3600) * 1000, abs=1),
    ]
    assert await redis.hgetall(keys.DELAYED_REASONS) == {b"retry": b"1", b"at_time": b"1"}
    while not await queued(redis):
        await broker.promote()
        await asyncio.sleep(0.02)
    assert time.time() >= due - 0.01
    assert await queued(redis) == [first]
    await broker.cancel(["second"])
    await redis.delete(QUEUE)


@pytest.mark.parametrize(
    "member",
    [b"no message at all", message("t", {"priority": "royal"}), message("t")[:20], b"\x86" + b"\xff" * 40],
    ids=["text", "no such queue", "cut off", "garbage"],
)
async def test_data_that_cannot_be_read_are_kept_and_reported_once(
    redis: Redis, broker: RedisStreamBroker, member: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    await redis.zadd(keys.DELAYED, {member: time.time()})
    await broker.promote()
    await broker.promote()
    [(_, kept)] = await redis.xrange(keys.DEAD_LETTERS)
    assert kept[b"data"] == member
    assert broker.counts.unparsable == 1
    assert caplog.text.count("1 delayed tasks cannot be read: they are dead letters now") == 1
    await redis.delete(keys.DEAD_LETTERS)


async def test_our_messages_have_all_fields_of_0_7(redis: Redis, broker: RedisStreamBroker) -> None:
    await broker.submit([Submission(TaskMessage(task_id="t", task_name="test:T"), QUEUE)])
    [data] = await queued(redis)
    assert msgpack.unpackb(data).keys() >= set(FIELDS)
    await redis.delete(QUEUE)


async def consumer(redis: Redis, name: str, *messages: bytes) -> None:
    """Give these to a worker of 0.7."""
    for data in messages:
        await redis.xadd(QUEUE, {b"data": data})
    if messages:
        await redis.xreadgroup(keys.GROUP, name, {QUEUE: ">"}, count=len(messages))


async def test_a_worker_does_not_start_beside_a_living_worker_of_0_7(
    redis: Redis, broker: RedisStreamBroker
) -> None:
    await redis.xgroup_create(QUEUE, keys.GROUP, "$", mkstream=True)
    name = str(uuid4())
    await consumer(redis, name, message("t"))
    with pytest.raises(
        UnusableServerError, match=f"is in use by worker {name} of diracx-tasks 0.7, which fetched tasks"
    ) as error:
        await broker.startup(Role.WORKER)
    assert "\n" not in str(error.value)
    await broker.startup(Role.SCHEDULER)
    await redis.delete(QUEUE)


@pytest.mark.leaves_keys("diracx:tasks:normal:medium", "diracx:tasks:alive", "diracx:tasks:leases")
async def test_messages_of_a_live_worker_of_0_7_stay_with_it_and_finished_ones_are_deleted(
    redis: Redis, broker: RedisStreamBroker
) -> None:
    await redis.xgroup_create(QUEUE, keys.GROUP, "$", mkstream=True)
    name = str(uuid4())
    await consumer(redis, name, *[message(str(number)) for number in range(600)])
    entries = [entry for entry, _ in await redis.xrange(QUEUE)]
    await redis.xack(QUEUE, keys.GROUP, *[entry for number, entry in enumerate(entries) if number not in (5, 300)])
    await redis.xadd(QUEUE, {b"data": message("new")})
    deliveries, *_ = await broker.reclaim(10, audit=True, lease_seconds=0.01)
    assert not deliveries
    assert [entry for entry, _ in await redis.xrange(QUEUE)][:2] == [entries[5], entries[300]]
    assert await redis.xlen(QUEUE) == 3
    seconds, _ = await redis.time()
    left = (await redis.zscore(keys.ALIVE, name) or 0) / 1000 - seconds
    assert left > 500, "it is not reclaimed while it lives"
    # Half a minute after its last sign of life, what it had is taken over.
    await published.track_workers(redis, [[{"name": name.encode(), "idle": 31_000}]], seconds * 1000)
    deliveries, *_ = await broker.reclaim(10, lease_seconds=60)
    assert [TaskMessage.loadb(each.data or b"").task_id for each in deliveries] == ["5", "300"]


async def test_one_scheduler_leads_among_schedulers_of_both_versions(redis: Redis) -> None:
    await redis.set(keys.PUBLISHED_LEADER, "of 0.7", px=2_000)
    assert not await scheduling.take_lead(redis, "ours", 5_000)
    assert 0 < await scheduling.lead_left_ms(redis) <= 400
    await redis.delete(keys.PUBLISHED_LEADER)
    assert await scheduling.take_lead(redis, "ours", 5_000)
    assert not await redis.set(keys.PUBLISHED_LEADER, "of 0.7", nx=True), "as 0.7 asks for it"
    assert await scheduling.renew_lead(redis, "ours", 5_000)
    await scheduling.release_lead(redis, "ours", 5_000)
    assert not await redis.exists(keys.PUBLISHED_LEADER, keys.LEADER)


async def test_a_downgrade_keeps_messages_that_0_7_would_lose(redis: Redis, broker: RedisStreamBroker) -> None:
    later = datetime.now(UTC).replace(year=2100)
    plain = TaskMessage(task_id="plain", task_name="test:T", task_args=[1])
    lost = TaskMessage(task_id="lost", task_name="test:T", task_args=[later])
    await broker.submit([Submission(each, QUEUE, later) for each in (plain, lost)])
    done = await published.downgrade(redis)
    assert done == {"reserved": 0, "delayed": 1, "groups": 0, "kept": 1}
    assert await redis.zscore(keys.DELAYED, plain.dumpb()) == pytest.approx(later.timestamp())
    assert await redis.hkeys(keys.DELAYED_DATA) == [b"lost"]
    assert await published.downgrade(redis) == {"reserved": 0, "delayed": 0, "groups": 0, "kept": 1}
    await redis.delete(keys.DELAYED, keys.DELAYED_DATA, keys.DELAYED_REASONS)


async def test_a_downgrade_is_refused_while_processes_of_this_version_run(
    redis: Redis, broker: RedisStreamBroker
) -> None:
    await broker.reclaim(1, lease_seconds=30)
    with pytest.raises(published.StillRunningError, match=f"worker {broker.consumer_name} runs"):
        await published.downgrade(redis)
    await broker.leave()
    await redis.set(keys.LEADER, "x", px=1000)
    with pytest.raises(published.StillRunningError, match="a scheduler leads"):
        await published.downgrade(redis)
