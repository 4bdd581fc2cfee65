"""A dead letter that the database refuses waits in Redis, and holds up no other task."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from diracx.tasks.plumbing import BaseTask, MutexLock
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.lock_registry import TASK
from diracx.tasks.plumbing.persistence import DeadLetter, TaskDB
from diracx.tasks.plumbing.worker.dead_letters import DeadLetterOffice
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from sqlalchemy import text
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
    """Let the database refuse letters with certain words."""
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
async def test_a_letter_larger_than_a_packet_waits_in_redis_and_its_lock_is_free(
    small_packets: str, redis_url: str, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    async with TaskSystem([Doomed], redis_url=redis_url, task_db_url=small_packets) as system:
        assert system.task_db is not None
        large = await Doomed("x" * 3 * MIB).schedule()
        small = await Doomed("y").schedule()
        await system.drain(60)
        assert [row["task_id"] for row in await system.task_db.search()] == [small]
    [letter] = await waiting(redis)
    assert large.encode() in letter
    [line] = [record.getMessage() for record in caplog.records if "refuses the dead letter" in record.getMessage()]
    assert large in line
    assert "dlq waiting" in line
    assert len(line) < 1000


@pytest.mark.leaves_keys(keys.DEAD_LETTERS)
@pytest.mark.parametrize("kind", ["sqlite", "mariadb", "postgresql"])
async def test_a_letter_that_the_database_refuses_waits_in_redis_until_it_is_taken(
    kind: str, request: pytest.FixtureRequest, empty_database: Any, redis_url: str, redis: Redis
) -> None:
    if kind != "sqlite":
        request.getfixturevalue(f"{kind}_server")
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
        await redis.xadd(keys.DEAD_LETTERS, _waiting_letter("fine"))
        assert await DeadLetterOffice(broker, db).adopt() == 1
        assert len(await waiting(redis)) == 1
    await broker.shutdown()


def _waiting_letter(detail: str) -> Any:
    from diracx.tasks.plumbing.worker.dead_letters import in_redis

    return in_redis(DeadLetter(task_id="another", task_name="test:Doomed", reason="x", detail=detail, data=b"?"))


@pytest.mark.leaves_keys(keys.DEAD_LETTERS)
async def test_letters_stay_in_redis_and_are_not_tried_one_by_one_while_the_database_is_away(
    tmp_path: Any, redis_url: str, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(5):
        await redis.xadd(keys.DEAD_LETTERS, _waiting_letter(str(number)))
    db, broker = TaskDB(f"sqlite+aiosqlite:///{tmp_path}/no/directory.db"), RedisStreamBroker(redis_url)
    async with db.engine_context():
        with caplog.at_level(logging.ERROR):
            assert await DeadLetterOffice(broker, db).adopt() == 0
    await broker.shutdown()
    [record] = [record for record in caplog.records if "stays in Redis" in record.getMessage()]
    assert record.exc_info is None
    assert "cannot be opened" in record.getMessage()
    assert len(await waiting(redis)) == 5
