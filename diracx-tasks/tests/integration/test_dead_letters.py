"""Dead letters on real databases: what is stored, what is decided, and what happens when a server is away."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import msgpack
import pytest
from diracx.db.exceptions import DBUnavailableError
from diracx.tasks.plumbing import BaseTask, ExponentialBackoff, Priority, Size
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.broker.models import TaskMessage
from diracx.tasks.plumbing.config import TasksConfig
from diracx.tasks.plumbing.persistence import OPEN, DeadLetter, DeadLetterStatus, TaskDB
from diracx.tasks.plumbing.persistence.published import import_published
from diracx.tasks.plumbing.persistence.resubmission import ResubmitStatus, Resubmitter, ticket
from diracx.tasks.plumbing.registry import TaskRegistry
from diracx.tasks.plumbing.task_names import AmbiguousTaskNameError
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from sqlalchemy import (
    Column,
    DateTime,
    Enum,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    insert,
    update,
)
from sqlalchemy.exc import SQLAlchemyError

STREAM = "diracx:tasks:background:small"
KINDS = ["sqlite", "mariadb", "postgresql"]


@dataclass
class Work(BaseTask):
    number: int

    priority: ClassVar[Priority] = Priority.BACKGROUND
    size: ClassVar[Size] = Size.SMALL

    async def execute(self) -> int:
        return self.number


REGISTRY = TaskRegistry({"test:Work": Work})


def make(number: int = 0, *, delivery_id: str | None = None, **changes: Any) -> DeadLetter:
    message = TaskMessage(
        task_id=f"task-{number}", task_name="test:Work", task_args=[number], labels={"attempts": [{"type": "E"}]}
    )
    values: dict[str, Any] = {
        "task_id": message.task_id,
        "task_name": "test:Work",
        "reason": "exhausted",
        "detail": f"detail {number}",
        "data": message.dumpb(),
        "attempts": [{"type": "ValueError", "message": "no", "traceback": "…", "started": datetime.now(UTC)}],
        "delivery_id": delivery_id or f"{STREAM}/{number}-0",
    }
    return DeadLetter(**values | changes)


@pytest.fixture(params=KINDS)
def db_kind(request: pytest.FixtureRequest) -> str:
    if request.param != "sqlite":
        request.getfixturevalue(f"{request.param}_server")
    return str(request.param)


@pytest.fixture
async def db_url(db_kind: str, empty_database: Callable[[str], Awaitable[str]]) -> str:
    return await empty_database(db_kind)


@pytest.fixture
async def db(db_url: str) -> AsyncIterator[TaskDB]:
    database = TaskDB(db_url)
    async with database.engine_context():
        async with database.engine.begin() as connection:
            await connection.run_sync(database.metadata.create_all)
        yield database


@pytest.fixture
async def broker(redis_url: str, redis: Redis) -> AsyncIterator[RedisStreamBroker]:
    found = RedisStreamBroker(redis_url)
    yield found
    await found.shutdown()
    await redis.delete(*keys.EVERY_STREAM)


async def store(db: TaskDB, *dead_letters: DeadLetter) -> None:
    async with db:
        for each in dead_letters:
            await db.insert(each)


async def rows(db: TaskDB, **where: Any) -> list[dict[str, Any]]:
    async with db:
        return await db.search(**{"status": None, "limit": 10_000, **where})


async def statuses(db: TaskDB) -> list[str]:
    return [str(row["status"]) for row in await rows(db)]


async def eventually(condition: Callable[[], Awaitable[Any]], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)


# --- what is stored ---------------------------------------------------------------------------------------


async def test_P12_any_dead_letter_is_read_as_it_was_stored(db: TaskDB) -> None:
    data = bytes(range(256)) * 8192
    odd = make(
        task_id="a",
        detail="nul \0, half a pair \udc80, 🚀",
        data=data,
        attempts=[{"message": "nul \0 half \udc80 🚀", "traceback": "x" * 100_000, 3: {1}, "at": float("nan")}],
        task_name="n" * 400,
    )
    also_odd = make(task_id="A", attempts=7, delivery_id="b" * 400, task_name="n" * 399 + "m")
    await store(db, odd, also_odd, make(task_id="i" * 300), make(task_id="i" * 301))
    first, second, *long = await rows(db)
    assert first["message"] == data
    assert first["detail"] == "nul \\x00, half a pair \\udc80, 🚀"
    assert first["attempts"][0]["message"] == "nul \0 half \udc80 🚀"
    assert (first["task_id"], second["task_id"]) == ("a", "A"), "two ids, whatever the collation"
    assert len({row["task_id"] for row in long}) == 2
    assert first["task_name"] != second["task_name"]
    async with db:
        found = await db.find("i" * 300)
        assert found is not None
        assert found["id"] == long[0]["id"]
        assert (await db.find(str(second["id"])) or {})["task_id"] == "A"
        assert await db.find("nothing") is None
    assert abs(first["buried_at"] - datetime.now(UTC)) < timedelta(seconds=30)


async def test_attempts_without_end_lose_their_oldest_tracebacks(db: TaskDB) -> None:
    attempts = [{"number": number, "traceback": "x" * 4000} for number in range(3000)]
    await store(db, make(attempts=attempts))
    [row] = await rows(db)
    assert len(row["attempts"]) == 3000
    assert row["attempts"][0]["traceback"] == ""
    assert row["attempts"][-1] == attempts[-1]
    assert len(json.dumps(row["attempts"])) <= 4_100_000


async def test_P12_storing_twice_changes_nothing_and_a_new_failure_makes_it_pending(db: TaskDB) -> None:
    await store(db, make(1), make(2))
    await store(db, make(1))
    [one, two] = await rows(db)
    async with db:
        await db.begin_resubmission([(one["id"], one["delivery_id"])])
    await store(db, make(1, detail="says the same worker again"))
    [one, _] = await rows(db)
    assert one["status"] == DeadLetterStatus.RESUBMITTING, "or the task would be submitted twice"
    assert one["detail"] == "detail 1"
    await store(db, make(1, delivery_id="elsewhere/1-0", reason="poison", attempts=[{"type": "Second"}]))
    [one, two] = await rows(db)
    assert one["status"] == DeadLetterStatus.PENDING
    assert (one["reason"], one["attempts"]) == ("poison", [{"type": "Second"}])
    [failure] = one["history"]
    assert failure["reason"] == "exhausted"
    assert failure["attempts"][0]["type"] == "ValueError"
    assert two["history"] == []


async def test_P12_storing_a_batch_is_storing_each_of_it(db: TaskDB) -> None:
    await db.insert_all([make(1), make(2), make(3)])
    first = await db.search(limit=100)
    await db.insert_all([make(3), make(4), make(5), make(4), make(1, delivery_id="again")])
    rows = {row["task_id"]: row for row in await db.search(limit=100)}
    assert len(rows) == 5
    assert [rows[row["task_id"]] for row in first[1:]] == first[1:], "what was stored already is unchanged"
    assert (rows["task-1"]["delivery_id"], len(rows["task-1"]["history"])) == ("again", 1)
    await db.insert_all([make(1)])
    assert await db.search(limit=100) == list(rows.values()), "an earlier delivery comes late, and opens nothing"


async def test_P12_workers_that_bury_at_once_do_not_disturb_each_other(db: TaskDB, db_url: str) -> None:
    from functools import partial

    from diracx.tasks.plumbing._util.retrying import retry_until_available

    async def store_one(number: int) -> None:
        await retry_until_available(
            partial(store, db, make(number)),
            "store",
            passing=lambda error: isinstance(error, SQLAlchemyError),
        )

    # In contexts of their own, as a worker stores them.
    await asyncio.gather(*(asyncio.create_task(store_one(number)) for number in [*range(20), *range(20)]))
    assert sorted(row["task_id"] for row in await rows(db)) == sorted(f"task-{number}" for number in range(20))


async def test_a_list_leaves_messages_attempts_and_histories_in_the_database(db: TaskDB) -> None:
    large = make(1, data=b"m" * 1_000_000, attempts=[{"type": "E", "traceback": "t" * 300_000}] * 3)
    await store(db, large, make(1, data=b"m" * 2_000_000, delivery_id="another"), make(2))
    async with db:
        first, second = await db.summaries()
        found = await db.find_summary("task-1"), await db.find_summary(str(first["id"]))
        assert await db.find_summary("task-3") is None
    assert found == (first, first)
    assert len(repr(first)) < 2_000
    assert (first["message_bytes"], first["failed_attempts"], first["earlier_burials"]) == (2_000_000, 1, 1)
    assert (second["failed_attempts"], second["earlier_burials"]) == (1, 0)
    [whole, _] = await rows(db)
    common = first.keys() & whole.keys()
    assert {name: first[name] for name in common} == {name: whole[name] for name in common}


async def test_filters_choose(db: TaskDB) -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)
    await store(
        db,
        make(1),
        make(2, task_name="other:Work", reason="poison"),
        make(3, task_name="test:HomeWork"),
    )
    after = datetime.now(UTC) + timedelta(seconds=1)

    async def chosen(**where: Any) -> list[str]:
        return [row["task_id"] for row in await rows(db, **where)]

    assert await chosen(task_name="test:Work") == ["task-1"]
    assert await chosen(task_name="HomeWork") == ["task-3"], "the class alone"
    with pytest.raises(AmbiguousTaskNameError, match="write other:Work or test:Work"):
        await chosen(task_name="Work")
    async with db:
        with pytest.raises(AmbiguousTaskNameError):
            await db.count(task_name="Work")
    assert await chosen(task_name="W_rk") == []
    assert await chosen(reason="poison") == ["task-2"]
    assert await chosen(status=OPEN, limit=2) == ["task-1", "task-2"]
    assert await chosen(status=DeadLetterStatus.DISCARDED) == []
    assert await chosen(since=before, before=after) == ["task-1", "task-2", "task-3"]
    assert await chosen(since=after) == []
    assert await chosen(before=before) == []
    async with db:
        assert await db.count(reason="exhausted") == {DeadLetterStatus.PENDING: 2}
        assert await db.count() == {DeadLetterStatus.PENDING: 3}


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


async def test_P34_what_cannot_be_submitted_is_refused_with_the_reason(
    db: TaskDB, broker: RedisStreamBroker, redis: Redis
) -> None:
    nobody = TaskMessage(task_id="x", task_name="test:Nobody").dumpb()
    too_many = TaskMessage(task_id="y", task_name="test:Work", task_args=[1, 2, 3]).dumpb()
    await store(db, make(1, data=b"\0garbage"), make(2, data=nobody), make(3, data=too_many), make(4))
    stored = await rows(db)
    async with db:
        assert await db.discard([(stored[3]["id"], stored[3]["delivery_id"])]) == {stored[3]["id"]}
    results = await Resubmitter(db, broker, REGISTRY).resubmit(await rows(db))
    assert [result.status for result in results] == [ResubmitStatus.REFUSED] * 4
    for result, said in zip(
        results,
        ["cannot be read", "'test:Nobody'", "does not take its arguments", "discarded"],
        strict=True,
    ):
        assert said in result.why
        assert "\n" not in result.why
    assert await statuses(db) == ["PENDING", "PENDING", "PENDING", "DISCARDED"]
    assert not await redis.keys("diracx:*")


@asynccontextmanager
async def operators(number: int, url: str, redis_url: str) -> AsyncIterator[list[Resubmitter]]:
    """As many as there are, each with connections of its own."""
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


@pytest.mark.parametrize("broke_off_after", ["the mark in SQL", "the submission"])
async def test_P34_repeating_an_interrupted_resubmission_finishes_it(
    db: TaskDB, broker: RedisStreamBroker, redis: Redis, broke_off_after: str
) -> None:
    await store(db, make(1), make(2))
    resubmitter = Resubmitter(db, broker, REGISTRY)
    stored = await rows(db)
    async with db:
        begun = await db.begin_resubmission([(row["id"], row["delivery_id"]) for row in stored])
    assert set(begun) == {row["id"] for row in stored}
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


async def test_P34_a_resubmission_that_the_broker_has_forgotten_is_not_repeated(
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


async def test_P34_at_a_start_poison_is_left_alone(db: TaskDB, broker: RedisStreamBroker) -> None:
    unlike = [make(number, reason=reason) for number, reason in enumerate(["poison", "exhausted", "arguments"])]
    await store(db, *unlike, make(9, reason="unparsable", data=b"?"))
    results = [v async for part in Resubmitter(db, broker, REGISTRY).resubmit_automatic() for v in part]
    assert sorted(result.dead_letter["task_id"] for result in results) == ["task-1", "task-2"]
    assert await statuses(db) == ["PENDING", "RESUBMITTED", "RESUBMITTED", "PENDING"]


# --- when a server is away --------------------------------------------------------------------------------


class Doomed(BaseTask):
    dlq_eligible = True
    retry_policy = ExponentialBackoff(base_delay_seconds=0.01, max_retries=1)

    async def execute(self) -> None:
        raise ValueError("doomed")


@dataclass
class Fine(BaseTask):
    number: int

    async def execute(self) -> int:
        return self.number


@pytest.mark.parametrize("kind", ["mariadb", "postgresql"])
async def test_P12_while_the_database_is_down_the_task_is_kept_and_others_run(
    kind: str, request: pytest.FixtureRequest, empty_database: Any, stoppable: Any, redis_url: str, redis: Redis
) -> None:
    server = stoppable(request.getfixturevalue(f"{kind}_server"))
    url = await empty_database(kind)
    stream = "diracx:tasks:normal:medium"
    settings = {"lease_seconds": 1.0}
    async with TaskSystem([Doomed, Fine], redis_url=redis_url, task_db_url=url, settings=settings) as system:
        assert system.task_db is not None
        # There is a connection in the pool, which the worker does not know to be dead.
        await system.result(await Doomed().schedule())
        await system.drain()
        server.kill()
        lost = [await Doomed().schedule() for _ in range(3)]

        async def all_failed() -> bool:
            """Each has its two executions behind it, and is in the worker's hands."""
            pending = await redis.xpending(stream, keys.GROUP)
            return int(pending["pending"]) == 3 and await redis.zcard(keys.DELAYED) == 0

        await eventually(all_failed)
        begun = time.monotonic()
        while time.monotonic() - begun < 2.5:  # more than two leases
            assert (await system.result(await Fine(1).schedule())).return_value == 1
            assert len(await redis.xrange(stream)) >= 3, "acknowledged before it was stored"
        [pending] = {row["times_delivered"] for row in await redis.xpending_range(stream, keys.GROUP, "-", "+", 9)}
        assert pending == 1, "its lease is kept, so nobody else runs it"
        server.start()
        await system.drain(30)
        async with system.task_db as db:
            stored = await db.search()
        assert {row["task_id"] for row in stored} > set(lost)
        assert len(stored) == 4
        assert all(len(row["attempts"]) == 2 for row in stored)


async def test_P12_a_database_that_answers_no_more_is_given_up_and_tried_anew(
    mariadb_server: Any, empty_database: Any, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = await empty_database("mariadb")
    async with TaskSystem([Doomed], redis_url=redis_url, task_db_url=url) as system:
        assert system.task_db is not None
        await system.result(await Doomed().schedule())
        await system.drain()
        with mariadb_server.frozen():
            cut_off = await Doomed().schedule()

            async def dropped() -> bool:
                return "cannot store a dead letter" in caplog.text

            await eventually(dropped)
        await system.drain(30)
        async with system.task_db as db:
            assert cut_off in [row["task_id"] for row in await db.search()]


@pytest.mark.parametrize("kind", ["mariadb", "postgresql"])
async def test_P12_a_commit_that_fails_does_not_spoil_the_next_transaction(
    kind: str, request: pytest.FixtureRequest, empty_database: Any, stoppable: Any
) -> None:
    server = stoppable(request.getfixturevalue(f"{kind}_server"))
    database = TaskDB(await empty_database(kind))
    async with database.engine_context():
        async with database.engine.begin() as connection:
            await connection.run_sync(database.metadata.create_all)

        async def broken_off() -> None:
            async with database:
                await database.insert(make(1))
                server.kill()

        with pytest.raises(DBUnavailableError):
            await broken_off()
        server.start()

        async def stored() -> bool:
            try:
                await store(database, make(1))
            except (SQLAlchemyError, DBUnavailableError):
                return False
            return True

        await eventually(stored)
        assert len(await rows(database)) == 1


async def test_P12_a_pending_dead_letter_that_cannot_be_imported_blocks_no_other(
    redis_url: str, redis: Redis
) -> None:
    async with TaskSystem([Doomed], redis_url=redis_url, task_db_url=None) as system:
        task_id = await Doomed().schedule()
        await system.result(task_id)
        await system.drain()
    await redis.xadd(keys.DEAD_LETTERS, {"reason": "?", "data": b"\xc1"})
    await redis.xadd(keys.DEAD_LETTERS, {"nothing": "known"})
    async with TaskSystem([Fine], redis_url=redis_url) as system:
        assert system.task_db is not None
        async with system.task_db as db:
            assert [row["task_id"] for row in await db.search()] == [task_id]
    assert await redis.xlen(keys.DEAD_LETTERS) == 2
    await redis.delete(keys.DEAD_LETTERS)


async def test_all_pending_rows_of_0_7_are_imported_whatever_is_in_them(db: TaskDB) -> None:
    columns = [Column("id", Integer, primary_key=True), Column("task_class", String(255))]
    columns += [Column("task_args", LargeBinary), Column("submitted_at", DateTime), Column("last_error", Text)]
    status = Enum("PENDING", "DISPATCHED", "FAILED", name="dlqstatus")
    published = Table("dlq_tasks", MetaData(), *columns, Column("status", status))
    whole = msgpack.packb({"task_args": [1], "task_kwargs": {}, "labels": {"vo": "lhcb"}})
    when, error = (
        datetime(2026, 1, 2, tzinfo=UTC).replace(tzinfo=None),
        "Traceback\nValueError: né: 7",
    )
    plain = {"task_class": "test:Work", "task_args": whole, "submitted_at": when, "last_error": error}
    rows = [plain | {"status": "PENDING"} for _ in range(230)]
    odd: list[dict[str, Any]] = [{"task_args": b"\xff no msgpack \x00"}, {"task_args": b""}, {"last_error": None}]
    odd += [{"task_class": "x" * 255}, {"last_error": "y" * 60_000}, {"task_args": msgpack.packb([1])}]
    rows += [plain | {"status": "PENDING"} | each for each in odd]
    rows += [plain | {"status": each} for each in ("FAILED", "DISPATCHED")]
    async with db.engine.begin() as connection:
        await connection.run_sync(published.create)
        await connection.execute(insert(published), rows)
    assert await import_published(db) == 236
    found = await db.search(limit=1000)
    assert Counter(each["reason"] for each in found) == {"exhausted": 233, "unparsable": 3}
    assert {each["detail"] for each in found} >= {"ValueError: né: 7", "failed under diracx-tasks 0.7"}
    assert sum(each["vo"] == "lhcb" for each in found) == 233
    await db.discard([(each["id"], each["delivery_id"]) for each in found[:5]])
    assert await import_published(db) == 0, "also of those that were decided"
    assert await db.count(status=DeadLetterStatus.PENDING) == {DeadLetterStatus.PENDING: 231}
