"""Dead letters on real databases: storage, queries and outages."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import msgpack
import pytest
from diracx.db.exceptions import DBUnavailableError
from diracx.tasks.plumbing import BaseTask, ExponentialBackoff
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.plumbing.persistence import OPEN, DeadLetterStatus, TaskDB
from diracx.tasks.plumbing.persistence.published import import_published
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
)
from sqlalchemy.exc import SQLAlchemyError
from support.databases import with_tables
from support.dead_letters import make, rows, store
from support.waiting import until

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


async def test_P12_storing_a_batch_equals_storing_each_dead_letter(db: TaskDB) -> None:
    await db.insert_all([make(1), make(2), make(3)])
    first = await db.search(limit=100)
    await db.insert_all([make(3), make(4), make(5), make(4), make(1, delivery_id="again")])
    rows = {row["task_id"]: row for row in await db.search(limit=100)}
    assert len(rows) == 5
    assert [rows[row["task_id"]] for row in first[1:]] == first[1:], "what was stored already is unchanged"
    assert (rows["task-1"]["delivery_id"], len(rows["task-1"]["history"])) == ("again", 1)
    await db.insert_all([make(1)])
    assert await db.search(limit=100) == list(rows.values()), "an earlier delivery comes late, and opens nothing"


async def test_P12_concurrent_workers_store_dead_letters_independently(db: TaskDB, db_url: str) -> None:
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


async def test_filters_select_dead_letters(db: TaskDB) -> None:
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

        await until(all_failed)
        begun = time.monotonic()
        while time.monotonic() - begun < 2.5:  # more than two leases
            assert (await system.result(await Fine(1).schedule())).return_value == 1
            assert len(await redis.xrange(stream)) >= 3, "acknowledged before it was stored"
            await asyncio.sleep(0.1)
        [pending] = {row["times_delivered"] for row in await redis.xpending_range(stream, keys.GROUP, "-", "+", 9)}
        assert pending == 1, "its lease is kept, so no other worker runs it"
        server.start()
        await system.drain(30)
        async with system.task_db as db:
            stored = await db.search()
        assert {row["task_id"] for row in stored} > set(lost)
        assert len(stored) == 4
        assert all(len(row["attempts"]) == 2 for row in stored)


async def test_P12_a_database_that_stops_responding_is_abandoned_and_tried_again(
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

            await until(dropped)
        await system.drain(30)
        async with system.task_db as db:
            assert cut_off in [row["task_id"] for row in await db.search()]


@pytest.mark.parametrize("kind", ["mariadb", "postgresql"])
async def test_P12_a_commit_that_fails_does_not_spoil_the_next_transaction(
    kind: str, request: pytest.FixtureRequest, empty_database: Any, stoppable: Any
) -> None:
    server = stoppable(request.getfixturevalue(f"{kind}_server"))
    database = TaskDB(await empty_database(kind))
    async with with_tables(database):

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

        await until(stored)
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
    # As by `dlq init` in several containers.
    assert sum(await asyncio.gather(*(import_published(db) for _ in range(4)))) == 236
    found = await db.search(limit=1000)
    assert Counter(each["reason"] for each in found) == {"exhausted": 233, "unparsable": 3}
    assert {each["detail"] for each in found} >= {"ValueError: né: 7", "failed under diracx-tasks 0.7"}
    assert sum(each["vo"] == "lhcb" for each in found) == 233
    await db.discard([(each["id"], each["delivery_id"]) for each in found[:5]])
    assert await import_published(db) == 0, "also of those that were decided"
    assert await db.count(status=DeadLetterStatus.PENDING) == {DeadLetterStatus.PENDING: 231}
