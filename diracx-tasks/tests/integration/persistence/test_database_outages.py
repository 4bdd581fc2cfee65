"""Dead letters during an outage of their database: none is lost or doubled, other tasks continue."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from diracx.tasks.plumbing import BaseTask, MutexLock, Priority, schedule_many
from diracx.tasks.plumbing.broker import dead_letter_stream, keys
from diracx.tasks.plumbing.lock_registry import TASK
from diracx.tasks.plumbing.persistence import DeadLetter, TaskDB
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from sqlalchemy.engine import make_url
from support.network import Network
from support.waiting import until

STREAM = "diracx:tasks:normal:medium"
QUEUED = 1_000
pytestmark = pytest.mark.leaves_keys(keys.DEAD_LETTERS)


@dataclass
class Failing(BaseTask):
    number: int
    dlq_eligible = True

    async def execute(self) -> None:
        raise ValueError(self.number)


@dataclass
class FailingWithLock(Failing):
    @property
    def execution_locks(self) -> list[Any]:
        return [MutexLock(TASK, f"failing-{self.number}")]


@dataclass
class Other(BaseTask):
    priority = Priority.REALTIME

    async def execute(self) -> str:
        return "went on"


TASKS = [Failing, FailingWithLock, Other]


@dataclass
class Database:
    """A database whose server can be reached through a network of its own."""

    url: str
    server_url: str
    network: Network
    disturbance: str

    @contextmanager
    def away(self) -> Iterator[None]:
        """Inside the block the server refuses connections, or hangs: it accepts them and does not respond."""
        if self.disturbance == "hanging":
            self.network.hold()
        else:
            self.network.lead_to("tcp://127.0.0.1:1")
        try:
            yield
        finally:
            self.network.lead_to(self.server_url)
            self.network.release()


@pytest.fixture(params=["mariadb refusing", "mariadb hanging", "postgresql refusing", "postgresql hanging"])
async def database(request: pytest.FixtureRequest, empty_database: Any) -> AsyncIterator[Database]:
    kind, disturbance = request.param.split()
    server = request.getfixturevalue(f"{kind}_server")
    network = Network(server.url)
    network.start()
    url = make_url(await empty_database(kind)).set(port=make_url(network.url).port)
    yield Database(url.render_as_string(hide_password=False), server.url, network, disturbance)
    network.stop()


@dataclass
class Count:
    transactions: int = 0
    open: int = 0
    most_open: int = 0


@asynccontextmanager
async def counted(db: TaskDB | None, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Count]:
    """Count the transactions that are begun inside the block, whether or not there is a connection for them."""
    assert db is not None
    count = Count()
    enter, leave = TaskDB.__aenter__, TaskDB.__aexit__

    async def counting(self: Any) -> Any:
        count.transactions += 1
        count.open += 1
        count.most_open = max(count.most_open, count.open)
        try:
            return await enter(self)
        except BaseException:
            count.open -= 1
            raise

    async def ending(self: Any, *error: Any) -> None:
        try:
            await leave(self, *error)
        finally:
            count.open -= 1

    with monkeypatch.context() as patched:
        patched.setattr(TaskDB, "__aenter__", counting)
        patched.setattr(TaskDB, "__aexit__", ending)
        yield count


async def stored(system: TaskSystem) -> list[str]:
    """Ids of the tasks that have a dead letter; each has been stored once."""
    assert system.task_db is not None
    rows = await system.task_db.summaries(limit=100_000)
    assert all(row["earlier_burials"] == 0 for row in rows)
    return sorted(row["task_id"] for row in rows)


async def test_a_burst_while_the_database_is_unavailable_has_one_retry_loop_and_a_bounded_queue(
    database: Database, redis_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, task_db_url=database.url, workers=1) as system:
        async with counted(system.task_db, monkeypatch) as away:
            with database.away():
                ids = await schedule_many([Failing(number) for number in range(QUEUED + 500)])

                async def diverted() -> bool:
                    return bool(await redis.xlen(keys.DEAD_LETTERS) == 500)

                await until(diverted)
                assert (await system.result(await Other().schedule())).return_value == "went on"
                assert await redis.xlen(STREAM) == QUEUED, "what is in the queue is not acknowledged"
        assert away.most_open <= 1
        assert away.transactions < 50
        async with counted(system.task_db, monkeypatch) as back:
            await system.drain(60)

            async def imported() -> bool:
                return not await redis.exists(keys.DEAD_LETTERS)

            await until(imported)
        assert back.most_open == 1
        assert back.transactions < 50, "they are stored and imported in batches"
        assert await stored(system) == sorted(ids)


async def test_after_some_time_dead_letters_and_their_locks_wait_no_longer_for_the_database(
    database: Database, redis_url: str, redis: Redis
) -> None:
    settings = {"dead_letter_seconds": 1.0, "database_answer_seconds": 1.0}
    async with TaskSystem(TASKS, redis_url=redis_url, task_db_url=database.url, settings=settings) as system:
        with database.away():
            ids = await schedule_many([FailingWithLock(number) for number in range(3)])
            await system.drain()
            assert await redis.xlen(keys.DEAD_LETTERS) == 3
            assert [key async for key in redis.scan_iter("lock:*")] == []
            ids += await schedule_many([Failing(number) for number in range(3)])
            await system.drain()  # these do not wait at all
            assert await redis.xlen(keys.DEAD_LETTERS) == 6

        async def imported() -> bool:
            return await stored(system) == sorted(ids)

        await until(imported)


async def test_a_worker_that_stops_while_the_database_is_unavailable_leaves_dead_letters_in_redis(
    database: Database, redis_url: str, redis: Redis
) -> None:
    with ExitStack() as stack:
        async with TaskSystem(TASKS, redis_url=redis_url, task_db_url=database.url) as system:
            stack.enter_context(database.away())
            ids = await schedule_many([FailingWithLock(number) for number in range(50)])

            async def failed() -> bool:
                return int((await redis.xpending(STREAM, keys.GROUP))["pending"]) == 50

            await until(failed)
        assert await redis.xlen(keys.DEAD_LETTERS) == 50
        assert await redis.xlen(STREAM) == 0
        assert [key async for key in redis.scan_iter("lock:*")] == []
    async with TaskSystem(TASKS, redis_url=redis_url, task_db_url=database.url) as system:

        async def imported() -> bool:
            return await stored(system) == sorted(ids)

        await until(imported)
    assert not await redis.exists(keys.DEAD_LETTERS)


async def test_dead_letters_left_in_redis_are_imported_by_a_running_worker(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(TASKS, redis_url=redis_url, workers=3, settings={"import_seconds": 0.1}) as system:
        ids = [f"task-{number:03}" for number in range(500)]
        for each in ids:
            failed = DeadLetter(task_id=each, task_name="test:Failing", reason="exhausted", detail="no", data=b"?")
            await redis.xadd(keys.DEAD_LETTERS, failed.to_stored())

        async def imported() -> bool:
            return not await redis.exists(keys.DEAD_LETTERS)

        await until(imported)
        assert await stored(system) == ids


async def test_dead_letters_go_to_redis_when_its_memory_is_full(redis_url: str, redis: Redis) -> None:
    settings = {"max_queued_dead_letters": 0, "import_seconds": 0.1}
    async with TaskSystem(TASKS, redis_url=redis_url, settings=settings) as system:
        await schedule_many([Failing(number) for number in range(20)])
        await redis.config_set("maxmemory", 1)
        try:
            await system.drain()
        finally:
            await redis.config_set("maxmemory", 0)

        async def imported() -> bool:
            return len(await stored(system)) == 20

        await until(imported)


async def test_dead_letters_that_redis_refuses_stay_unacknowledged_and_others_run(
    redis_url: str, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    await redis.set(keys.DEAD_LETTERS, "of another type")
    async with TaskSystem(TASKS, redis_url=redis_url, settings={"max_queued_dead_letters": 0}) as system:
        await schedule_many([Failing(number) for number in range(20)])

        async def refused() -> bool:
            return caplog.text.count("is not settled") == 20

        await until(refused)
        assert (await system.result(await Other().schedule())).return_value == "went on"
        assert await redis.xlen(STREAM) == 20
    await redis.delete(*keys.EVERY_STREAM)


# --- the import -------------------------------------------------------------------------------------------


async def test_imports_of_dead_letters_are_bounded_in_bytes_and_exclusive(
    redis: Redis,
) -> None:
    for number, size in enumerate([10, 10, 5000, 3000, 3000, 20_000, 10]):
        await redis.xadd(keys.DEAD_LETTERS, {"reason": "x", "data": b"d" * size}, id=f"{number + 1}-0")

    async def read(worker: str, first: str, at_most: int = 100) -> list[str]:
        entries = await dead_letter_stream.dead_letters(
            redis, worker, first, lease_ms=60_000, at_most=at_most, at_most_bytes=8000
        )
        return [entry for entry, _ in entries]

    assert await read("one", "-") == ["1-0", "2-0", "3-0"]
    assert await read("another", "-") == []
    assert await read("one", "(3-0") == ["4-0", "5-0"]
    assert await read("one", "(5-0") == ["6-0"], "alone, for it is larger than that"
    assert await read("one", "(6-0") == ["7-0"]
    assert await read("one", "(7-0") == []
    assert await read("another", "-", at_most=2) == ["1-0", "2-0"]
    await redis.delete(keys.DEAD_LETTERS)
    assert await read("another", "-") == []
    assert not await redis.exists(keys.IMPORTER)
