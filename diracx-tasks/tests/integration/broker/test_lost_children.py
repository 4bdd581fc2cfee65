"""Groups complete despite lost and unreadable data."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import msgpack
import pytest
from diracx.tasks.plumbing import BaseTask, ExponentialBackoff, MutexLock, spawn_with_callback
from diracx.tasks.plumbing.broker import keys, scripts
from diracx.tasks.plumbing.broker.group_audit import audit_if_due, fail_lost_children
from diracx.tasks.plumbing.broker.models import TaskMessage
from diracx.tasks.plumbing.exceptions import NewerMessageError
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from support.waiting import until

QUEUE = "diracx:tasks:normal:medium"
ENDED: list[str] = []


@dataclass
class Child(BaseTask):
    what: str

    retry_policy = ExponentialBackoff(base_delay_seconds=3600, max_retries=1)

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(JOB, "held")] if self.what == "parked" else []

    async def execute(self) -> None:
        if self.what == "retrying":
            raise ValueError("the first time")
        if self.what == "running":
            ENDED.append("not yet")
            await asyncio.Event().wait()


class Succeeded(BaseTask):
    async def execute(self) -> None:
        ENDED.append("callback")


class Failed(BaseTask):
    async def execute(self) -> None:
        ENDED.append("on_failure")


TASKS = [Child, Succeeded, Failed]


@pytest.fixture(autouse=True)
def nothing_has_ended() -> None:
    ENDED.clear()


async def entries(redis: Redis) -> dict[str, bytes]:
    """Task id -> entry in the queue."""
    return {TaskMessage.loadb(fields[b"data"]).task_id: entry for entry, fields in await redis.xrange(QUEUE)}


async def test_a_child_that_the_server_has_lost_fails_and_ends_its_group(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0, scheduler=False) as system:
        await spawn_with_callback([Child("done"), Child("done")], Succeeded(), on_failure=Failed())
        lost = next(iter((await entries(redis)).values()))
        await redis.xdel(QUEUE, lost)
        # Unreadable entries beside it do not matter.
        await redis.zadd(keys.GROUPS, {b"\xff": 1, "odd": 2})
        await redis.set(f"{keys.GROUPS_PREFIX}odd", "no hash", ex=60)
        assert await fail_lost_children(redis) == 1
        assert await fail_lost_children(redis) == 0
    async with TaskSystem(TASKS, redis_url=redis_url) as system:
        await system.drain()
    assert ENDED == ["on_failure"]


@pytest.mark.leaves_keys("diracx:tasks:normal:medium:handover")
async def test_a_child_that_waits_runs_or_has_ended_is_not_counted_as_lost(redis_url: str, redis: Redis) -> None:
    held = MutexLock(JOB, "held")
    assert await held.acquire(redis)
    async with TaskSystem(TASKS, redis_url=redis_url, scheduler=False, settings={"grace_seconds": 0.1}) as system:
        children = [Child(what) for what in ("retrying", "parked", "running", "done")]
        await spawn_with_callback(children, Succeeded())
        [group] = await redis.zrange(keys.GROUPS, 0, -1)
        pending = f"{keys.GROUPS_PREFIX}{group.decode()}:pending"
        await until(lambda: redis.scard(pending), when=lambda found: found <= 3)
        await until(lambda: redis.hlen(keys.DELAYED_DATA), when=lambda found: found >= 2)
        assert await fail_lost_children(redis) == 0
        await held.release(redis)
        await redis.flushall()
        assert system is not None


@pytest.mark.leaves_keys("diracx:*")
async def test_a_child_that_waits_in_a_long_queue_is_not_lost(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0, scheduler=False):
        for _ in range(1200):
            await redis.xadd(QUEUE, {"data": b"something else"})
        await spawn_with_callback([Child("done")], Succeeded())
        await Child("later").schedule(at_time=datetime.now(UTC) + timedelta(hours=1))
        assert await fail_lost_children(redis) == 0


async def test_groups_are_audited_when_the_server_is_another_one_and_once_a_day(redis: Redis) -> None:
    assert await audit_if_due(redis) == 0
    assert await audit_if_due(redis) is None
    await redis.set(keys.GROUPS_AUDITED, "another server", ex=60)
    assert await audit_if_due(redis) == 0
    assert 0 < await redis.ttl(keys.GROUPS_AUDITED) <= 86_400


async def test_a_child_that_cannot_be_read_ends_its_group(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0, scheduler=False):
        await spawn_with_callback([Child("done"), Child("done")], Succeeded(), on_failure=Failed())
        [(child, entry), _] = (await entries(redis)).items()
        await redis.xdel(QUEUE, entry)
        await redis.xadd(QUEUE, {"data": msgpack.packb({"task_id": child, "task_name": 7})})
    async with TaskSystem(TASKS, redis_url=redis_url) as system:
        await system.drain()
    assert ENDED == ["on_failure"]


async def test_a_completely_unreadable_child_ends_its_group_by_an_early_audit(
    redis_url: str, redis: Redis
) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0, scheduler=False):
        await spawn_with_callback([Child("done"), Child("done")], Succeeded(), on_failure=Failed())
        await audit_if_due(redis)
        [(_, entry), _] = (await entries(redis)).items()
        await redis.xdel(QUEUE, entry)
        await redis.xadd(QUEUE, {"data": b"\xc1"})
    async with TaskSystem(TASKS, redis_url=redis_url, scheduler=False) as system:
        await system.drain()
        assert await audit_if_due(redis) == 1
        await system.drain()
    assert ENDED == ["on_failure"]


@pytest.mark.leaves_keys("diracx:*")
async def test_a_delayed_child_that_cannot_be_put_into_a_stream_ends_its_group(
    redis_url: str, redis: Redis
) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0, scheduler=False) as system:
        await spawn_with_callback([Child("done"), Child("done")], Succeeded(), on_failure=Failed())
        await audit_if_due(redis)
        [(child, entry), _] = (await entries(redis)).items()
        await redis.xdel(QUEUE, entry)
        await redis.hset(keys.DELAYED_DATA, child, "no header")
        await redis.zadd(keys.DELAYED, {child: 1})
        await system.broker.promote()
        assert await audit_if_due(redis) == 1


async def test_a_message_of_a_later_version_is_redelivered_and_no_dead_letter(
    redis_url: str, redis: Redis
) -> None:
    newer = msgpack.packb(
        {"task_id": "new", "task_name": "test:Child", "format": 2, "task_args": {"what": "done"}}
    )
    async with TaskSystem(TASKS, redis_url=redis_url, scheduler=False) as system:
        await redis.xadd(QUEUE, {"data": newer})
        await until(lambda: redis.hexists(keys.DELAYED_DATA, "new"))
        assert (await redis.hget(keys.DELAYED_DATA, "new")).endswith(newer)
        assert system.task_db is not None
        async with system.task_db as db:
            assert await db.search() == []
        await redis.delete(keys.DELAYED, keys.DELAYED_DATA)


async def test_messages_of_a_later_version_are_redelivered_at_varying_times(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, scheduler=False):
        for number in range(20):
            await redis.xadd(QUEUE, {"data": msgpack.packb({"task_id": f"new {number}", "format": 2})})
        await until(lambda: redis.zcard(keys.DELAYED), when=lambda found: found >= 20)
        due_ms = [due for _, due in await redis.zrange(keys.DELAYED, 0, -1, withscores=True)]
        assert max(due_ms) - min(due_ms) > 2000
        await redis.delete(keys.DELAYED, keys.DELAYED_DATA)


async def test_a_child_of_a_later_version_that_is_cancelled_ends_its_group(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0, scheduler=False) as system:
        await spawn_with_callback([Child("done"), Child("done")], Succeeded(), on_failure=Failed())
        [(queued, entry), (delayed, other)] = (await entries(redis)).items()
        await redis.xdel(QUEUE, entry, other)
        newer = {task: msgpack.packb({"task_id": task, "format": 2}) for task in (queued, delayed)}
        await redis.xadd(QUEUE, {"data": newer[queued]})
        later = int(time.time() + 3600) * 1000
        await scripts.delay(redis, [(delayed, later, QUEUE, "retry", newer[delayed])])
        await system.broker.cancel([queued, delayed])
    async with TaskSystem(TASKS, redis_url=redis_url) as system:
        await system.drain()
    assert ENDED == ["on_failure"]


@pytest.mark.parametrize(
    "added",
    [
        {"task_args": [msgpack.ExtType(99, b"a type that came later")], "format": 2},
        {"format": 2, "later": msgpack.ExtType(99, b"")},
        {"format": 3, "task_name": 7, "labels": "of another type"},
    ],
)
def test_a_message_of_a_later_version_that_cannot_be_decoded_is_known_as_such(added: dict[str, object]) -> None:
    data = msgpack.packb({"task_id": "new", "task_name": "test:Child", **added})
    with pytest.raises(NewerMessageError, match="its format is"):
        TaskMessage.loadb(data)
    for broken in (data[:-1], data + b"x"):  # else no worker would ever fetch it
        with pytest.raises(ValueError, match="not a task message") as caught:
            TaskMessage.loadb(broken)
        assert not isinstance(caught.value, NewerMessageError)


@pytest.mark.parametrize("what", ["retrying", "running"])
async def test_fields_of_a_later_version_are_kept_when_a_task_is_restarted(
    redis_url: str, redis: Redis, what: str
) -> None:
    """After a failure, and after an interruption at the end of a worker's grace period."""
    fields = {"task_id": "t", "task_name": "test:Child", "task_args": [what], "deadline": 5}
    await redis.xadd(QUEUE, {"data": msgpack.packb(fields)})
    async with TaskSystem(TASKS, redis_url=redis_url, scheduler=False, settings={"grace_seconds": 0.1}):
        await until(lambda: redis.hexists(keys.DELAYED_DATA, "t"), when=lambda stored: bool(ENDED or stored))
    if what == "retrying":
        stored = (await redis.hget(keys.DELAYED_DATA, "t")).split(b"\n", 1)[1]
    else:
        [(_, entry)] = await redis.xrange(f"{QUEUE}:handover")
        stored = entry[b"data"]
    message = TaskMessage.loadb(stored)
    assert (len(message.attempts), message.later_fields) == (1, {"deadline": 5})
    await redis.flushall()


async def test_fields_of_a_later_version_are_kept_in_messages() -> None:
    fields = {"task_id": "t", "task_name": "test:Child", "deadline": 5, "later_fields": {"x": 1}}
    message = TaskMessage.loadb(msgpack.packb(fields))
    assert message.later_fields == {"deadline": 5, "later_fields": {"x": 1}}
    empty = {"labels": {}, "task_args": [], "task_kwargs": {}, "trace_context": {}}  # as version 0.7 reads them
    assert msgpack.unpackb(message.dumpb()) == fields | empty
