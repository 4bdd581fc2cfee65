"""A dead letter refused by the database stays in Redis without delaying other tasks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from diracx.tasks.plumbing import BaseTask, MutexLock
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.lock_registry import TASK
from diracx.tasks.plumbing.persistence import DeadLetter, TaskDB
from diracx.tasks.plumbing.worker.dead_letters import DeadLetterStore
from diracx.tasks.plumbing.worker.settings import WorkerSettings
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import create_async_engine

MIB = 1 << 20
WORDS = "not for me"


@dataclass
class Doomed(BaseTask):
    payload: str

    dlq_eligible = True

    @property
    def execution_locks(self) -> list[Any]:
        return [MutexLock(TASK, "doomed")]

    async def execute(self) -> None:
        raise ValueError(self.payload[:20])


@pytest.fixture
async def small_packets(mariadb_server: Any, empty_database: Any) -> AsyncIterator[str]:
    """A database whose server takes no packet of more than a megabyte."""
    url = await empty_database("mariadb")
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        before = (await connection.execute(text("SELECT @@GLOBAL.max_allowed_packet"))).scalar_one()
        await connection.execute(text(f"SET GLOBAL max_allowed_packet={MIB}"))
        yield url
        await connection.execute(text(f"SET GLOBAL max_allowed_packet={before}"))
    await engine.dispose()


async def picky(db: TaskDB) -> None:
    """Let the database refuse dead letters with certain words."""
    async with db.engine.begin() as connection:
        if connection.dialect.name == "sqlite":
            statement = (
                f"CREATE TRIGGER picky BEFORE INSERT ON DeadLetters WHEN NEW.Detail LIKE '%{WORDS}%' "
                "BEGIN SELECT RAISE(ABORT, 'refused'); END"
            )
        else:
            table, column = (
                connection.dialect.identifier_preparer.quote(name) for name in ("DeadLetters", "Detail")
            )
            statement = f"ALTER TABLE {table} ADD CONSTRAINT picky CHECK ({column} NOT LIKE '%{WORDS}%')"
        await connection.execute(text(statement))


async def waiting(redis: Redis) -> list[bytes]:
    return [fields[b"data"] for _, fields in await redis.xrange(keys.DEAD_LETTERS)]


@pytest.mark.leaves_keys(keys.DEAD_LETTERS)
async def test_a_dead_letter_larger_than_a_packet_waits_in_redis_and_its_lock_is_free(
    small_packets: str, redis_url: str, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    async with TaskSystem([Doomed], redis_url=redis_url, task_db_url=small_packets) as system:
        assert system.task_db is not None
        large = await Doomed("x" * 3 * MIB).schedule()
        small = await Doomed("y").schedule()
        await system.drain(60)
        assert [row["task_id"] for row in await system.task_db.search()] == [small]
    [dead_letter] = await waiting(redis)
    assert large.encode() in dead_letter
    [line] = [record.getMessage() for record in caplog.records if "refuses the dead letter" in record.getMessage()]
    assert large in line
    assert "dlq waiting" in line
    assert len(line) < 1000


@pytest.mark.leaves_keys(keys.DEAD_LETTERS)
@pytest.mark.parametrize("kind", ["sqlite", "mariadb", "postgresql"])
async def test_a_dead_letter_that_the_database_refuses_waits_in_redis(
    kind: str, empty_database: Any, redis_url: str, redis: Redis
) -> None:
    url = await empty_database(kind)
    async with TaskSystem([Doomed], redis_url=redis_url, task_db_url=url) as system:
        assert system.task_db is not None
        await picky(system.task_db)
        for payload in (WORDS, "fine"):
            await Doomed(payload).schedule()
        await system.drain(30)
        assert [row["detail"] for row in await system.task_db.search()] == ["fine"]
    assert len(await waiting(redis)) == 1
    # At the next start it is refused again, and no other waits for it.
    db, broker = TaskDB(url), RedisStreamBroker(redis_url)
    async with db.engine_context():
        await redis.xadd(keys.DEAD_LETTERS, _waiting_dead_letter("fine"))
        await import_once(broker, db)
        assert len(await db.search()) == 2
        assert len(await waiting(redis)) == 1
    await broker.shutdown()


async def import_once(broker: RedisStreamBroker, db: TaskDB) -> None:
    store = DeadLetterStore(broker, WorkerSettings(), db, None, None)  # type: ignore[arg-type]  # nothing is settled here
    running = asyncio.create_task(store.run())
    async with asyncio.timeout(30):
        await store.caught_up.wait()
    running.cancel()
    await asyncio.wait([running])


def _dead_letter(detail: str, task_id: str) -> DeadLetter:
    return DeadLetter(task_id=task_id, task_name="test:Doomed", reason="x", detail=detail, data=b"?")


def _waiting_dead_letter(detail: str, task_id: str = "another") -> Any:
    return _dead_letter(detail, task_id).to_stored()


@pytest.mark.leaves_keys(keys.DEAD_LETTERS)
async def test_dead_letters_stay_in_redis_during_a_database_outage(
    tmp_path: Any, redis_url: str, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(5):
        await redis.xadd(keys.DEAD_LETTERS, _waiting_dead_letter(str(number)))
    db, broker = TaskDB(f"sqlite+aiosqlite:///{tmp_path}/no/directory.db"), RedisStreamBroker(redis_url)
    async with db.engine_context():
        with caplog.at_level(logging.WARNING):
            await import_once(broker, db)
    await broker.shutdown()
    [record] = [record for record in caplog.records if "cannot store" in record.getMessage()]
    assert record.exc_info is None
    assert "cannot be opened" in record.getMessage()
    assert len(await waiting(redis)) == 5


# --- batches ----------------------------------------------------------------------------------------------


@pytest.mark.leaves_keys(keys.DEAD_LETTERS)
async def test_one_refused_dead_letter_of_a_batch_does_not_keep_the_others_out(
    db: TaskDB, redis_url: str, redis: Redis
) -> None:
    await picky(db)
    refused = {7, 8, 61, 99, 130}
    for number in range(150):
        detail = WORDS if number in refused else "fine"
        await redis.xadd(keys.DEAD_LETTERS, _waiting_dead_letter(detail, f"task-{number}"))
    commits: list[Any] = []
    event.listen(db.engine.sync_engine, "commit", commits.append)
    broker = RedisStreamBroker(redis_url)
    await import_once(broker, db)
    await broker.shutdown()
    assert {row["task_id"] for row in await db.summaries(limit=1000)} == {
        f"task-{number}" for number in set(range(150)) - refused
    }
    left = [DeadLetter.of_entry(entry.decode(), fields) for entry, fields in await redis.xrange(keys.DEAD_LETTERS)]
    assert {each.task_id for each in left} == {f"task-{number}" for number in refused}
    assert len(commits) < 75, "the others go in batches"


async def test_a_batch_that_breaks_off_stores_nothing(db: TaskDB) -> None:
    await picky(db)
    with pytest.raises(Exception, match=r"(?i)refused|constraint"):
        await db.insert_all([_dead_letter("fine", "one"), _dead_letter(WORDS, "two")])
    assert await db.search() == []
