"""Resubmission of dead letters happens once, with several operators and after interruptions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest
from diracx.tasks.plumbing import SendTaskError
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.broker.models import TaskMessage
from diracx.tasks.plumbing.config import TasksConfig
from diracx.tasks.plumbing.persistence import DeadLetterStatus, TaskDB
from diracx.tasks.plumbing.persistence.resubmission import ResubmitStatus, Resubmitter, ticket
from diracx.tasks.plumbing.registry import TaskRegistry
from redis.asyncio import Redis
from sqlalchemy import (
    update,
)
from support.dead_letters import STREAM, Work, make, rows, store

REGISTRY = TaskRegistry({"test:Work": Work})


@pytest.fixture
async def broker(redis_url: str, redis: Redis) -> AsyncIterator[RedisStreamBroker]:
    found = RedisStreamBroker(redis_url)
    yield found
    await found.shutdown()
    await redis.delete(*keys.EVERY_STREAM)


async def statuses(db: TaskDB) -> list[str]:
    return [str(row["status"]) for row in await rows(db)]


# --- submitting again -------------------------------------------------------------------------------------


async def test_P34_a_resubmitted_task_keeps_its_id_and_has_no_attempts(
    db: TaskDB, broker: RedisStreamBroker, redis: Redis
) -> None:
    await store(db, make(5))
    [row] = await rows(db)
    [result] = await Resubmitter(db, broker, REGISTRY).resubmit([row])
    assert result.status is ResubmitStatus.RESUBMITTED
    [(_, fields)] = await redis.xrange(STREAM)
    message = TaskMessage.loadb(fields[b"data"])
    assert (message.task_id, message.task_args, message.attempts) == ("task-5", [5], [])
    [row] = await rows(db)
    assert row["status"] == DeadLetterStatus.RESUBMITTED
    assert row["attempts"][0]["type"] == "ValueError", "the row keeps them"
    [result] = await Resubmitter(db, broker, REGISTRY).resubmit([row])
    assert result.status is ResubmitStatus.ALREADY
    assert await redis.xlen(STREAM) == 1
    # The operator's priority counts, as for every submission; and the next failure is a new dead letter.
    await store(db, make(5, delivery_id="a-later-one"))
    config = TasksConfig.model_validate({"common": {"test:Work": {"priority": "realtime"}}})
    [result] = await Resubmitter(db, broker, REGISTRY, config).resubmit(await rows(db))
    assert result.status is ResubmitStatus.RESUBMITTED
    assert await redis.xlen("diracx:tasks:realtime:small") == 1
    assert await redis.ttl(keys.RESUBMITTED_PREFIX + ticket(row)) > 86400


async def test_P34_a_dead_letter_that_cannot_be_submitted_is_refused_with_the_reason(
    db: TaskDB, broker: RedisStreamBroker, redis: Redis
) -> None:
    unknown = TaskMessage(task_id="x", task_name="test:Unknown").dumpb()
    too_many = TaskMessage(task_id="y", task_name="test:Work", task_args=[1, 2, 3]).dumpb()
    await store(db, make(1, data=b"\0garbage"), make(2, data=unknown), make(3, data=too_many), make(4))
    stored = await rows(db)
    async with db:
        assert await db.discard([(stored[3]["id"], stored[3]["delivery_id"])]) == {stored[3]["id"]}
    results = await Resubmitter(db, broker, REGISTRY).resubmit(await rows(db))
    assert [result.status for result in results] == [ResubmitStatus.REFUSED] * 4
    for result, message in zip(
        results,
        ["cannot be decoded", "'test:Unknown'", "does not accept its arguments", "discarded"],
        strict=True,
    ):
        assert message in result.why
        assert "\n" not in result.why
    assert await statuses(db) == ["PENDING", "PENDING", "PENDING", "DISCARDED"]
    assert not await redis.keys("diracx:*")


@asynccontextmanager
async def operators(number: int, url: str, redis_url: str) -> AsyncIterator[list[Resubmitter]]:
    """Resubmitters of so many operators, each with connections of its own."""
    async with AsyncExitStack() as stack:
        found = []
        for _ in range(number):
            database = TaskDB(url)
            await stack.enter_async_context(database.engine_context())
            broker = RedisStreamBroker(redis_url)
            stack.push_async_callback(broker.shutdown)
            found.append(Resubmitter(database, broker, REGISTRY))
        yield found


async def test_P34_concurrent_operators_resubmit_each_dead_letter_once(
    db: TaskDB, db_url: str, redis_url: str, broker: RedisStreamBroker, redis: Redis
) -> None:
    total = 230  # three rounds
    await store(db, *(make(number) for number in range(total)))

    async def submit(resubmitter: Resubmitter) -> int:
        parts = [part async for part in resubmitter.resubmit_all({})]
        return sum(result.status is ResubmitStatus.RESUBMITTED for part in parts for result in part)

    async with operators(4, db_url, redis_url) as all_of_them:
        submitted = await asyncio.gather(*(asyncio.create_task(submit(each)) for each in all_of_them))
    assert sum(submitted) == total
    ids = [TaskMessage.loadb(fields[b"data"]).task_id for _, fields in await redis.xrange(STREAM)]
    assert sorted(ids) == sorted(f"task-{number}" for number in range(total))
    assert set(await statuses(db)) == {"RESUBMITTED"}


@pytest.mark.parametrize("broke_off_after", ["the mark in SQL", "an error of the queue", "the submission"])
async def test_P34_repeating_an_interrupted_resubmission_finishes_it(
    db: TaskDB, broker: RedisStreamBroker, redis: Redis, broke_off_after: str
) -> None:
    await store(db, make(1), make(2))
    resubmitter = Resubmitter(db, broker, REGISTRY)
    stored = await rows(db)
    async with db:
        begun = await db.begin_resubmission([(row["id"], row["delivery_id"]) for row in stored])
    assert set(begun) == {row["id"] for row in stored}
    if broke_off_after == "an error of the queue":
        await redis.set(STREAM, "no stream")
        with pytest.raises(SendTaskError, match="WRONGTYPE"):
            await resubmitter.resubmit(stored)
        await redis.delete(STREAM)
    if broke_off_after == "the submission":
        await broker.resubmit([(ticket(row), resubmitter._submission(row, row["message"])) for row in stored])
    async with db:
        assert await db.discard([(row["id"], row["delivery_id"]) for row in stored]) == set(), "too late for that"
    results = [result async for part in resubmitter.resubmit_all({}) for result in part]
    expected = ResubmitStatus.ALREADY if broke_off_after == "the submission" else ResubmitStatus.RESUBMITTED
    assert [result.status for result in results] == [expected] * 2
    assert await redis.xlen(STREAM) == 2
    assert await statuses(db) == ["RESUBMITTED"] * 2


async def test_P34_a_task_that_fails_again_before_its_row_is_written_stays_pending(
    db: TaskDB, broker: RedisStreamBroker
) -> None:
    await store(db, make(1))
    [row] = await rows(db)
    async with db:
        await db.begin_resubmission([(row["id"], row["delivery_id"])])
    await store(db, make(1, delivery_id="again"))
    async with db:
        await db.end_resubmission([(row["id"], row["delivery_id"])])
    assert await statuses(db) == ["PENDING"]
    # A user who saw the dead letter before cannot decide about the new one.
    [result] = await Resubmitter(db, broker, REGISTRY).resubmit([row])
    assert result.status is ResubmitStatus.ALREADY
    async with db:
        assert await db.discard([(row["id"], row["delivery_id"])]) == set()
    assert await statuses(db) == ["PENDING"]


async def test_P34_an_old_interrupted_resubmission_is_refused_and_can_be_discarded(
    db: TaskDB, broker: RedisStreamBroker, redis: Redis
) -> None:
    from diracx.tasks.plumbing.persistence.schema import DeadLetters

    await store(db, make(1))
    long_ago = datetime.now(UTC) - timedelta(days=30)
    async with db:
        values = {"status": DeadLetterStatus.RESUBMITTING, "changed_at": long_ago}
        await db.conn.execute(update(DeadLetters).values(**values))
    [result] = await Resubmitter(db, broker, REGISTRY).resubmit(await rows(db))
    assert result.status is ResubmitStatus.REFUSED
    assert f"{long_ago:%Y-%m-%d}" in result.why
    assert not await redis.exists(STREAM)
    [row] = await rows(db)
    assert await db.discard([(row["id"], row["delivery_id"])]) == {row["id"]}
    assert await statuses(db) == ["DISCARDED"]


async def test_P34_the_resubmission_at_a_start_skips_poison(db: TaskDB, broker: RedisStreamBroker) -> None:
    unlike = [make(number, reason=reason) for number, reason in enumerate(["poison", "exhausted", "arguments"])]
    await store(db, *unlike, make(9, reason="unparsable", data=b"?"))
    results = [v async for part in Resubmitter(db, broker, REGISTRY).resubmit_automatic() for v in part]
    assert sorted(result.dead_letter["task_id"] for result in results) == ["task-1", "task-2"]
    assert await statuses(db) == ["PENDING", "RESUBMITTED", "RESUBMITTED", "PENDING"]
