"""With a backlog, the next fetch is sent before the fetched tasks start."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from diracx.tasks.plumbing import BaseTask
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.broker.models import Submission, TaskMessage
from diracx.tasks.plumbing.broker.redis_streams import FetchReply
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.plumbing.worker.worker import Worker
from diracx.tasks.testing import TaskSystem
from redis import Redis as SyncRedis
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from support.intakes import NORMAL, intake_of, name_of, submission
from support.leased_deliveries import LeasedDeliveries
from support.waiting import until

pytestmark = pytest.mark.event_loops("asyncio", "uvloop")

STARTED: Counter[int] = Counter()
#: Called when a worker builds its next task; the event loop waits for it.
AT_BUILD: list[Callable[[], None]] = []
ALL = 200
#: More messages than one call fetches.
FETCHED_AHEAD = 60
#: Numbers of the tasks that wait until they are cancelled.
WAITING: set[int] = set()


@dataclass
class Observed(BaseTask):
    number: int

    @property
    def execution_locks(self) -> list[BaseLock]:
        if AT_BUILD:
            AT_BUILD.pop()()
        return []

    async def execute(self) -> None:
        STARTED[self.number] += 1
        if self.number in WAITING:
            await asyncio.Event().wait()


@pytest.fixture
async def system(redis_url: str) -> AsyncIterator[TaskSystem]:
    STARTED.clear()
    AT_BUILD.clear()
    WAITING.clear()
    async with TaskSystem([Observed], redis_url=redis_url, workers=1, concurrency=100, scheduler=False) as system:
        yield system


@pytest.fixture
def sync(redis_url: str) -> Iterator[SyncRedis]:
    with SyncRedis.from_url(redis_url) as redis:
        yield redis


IDS = [f"{number:032x}" for number in range(ALL)]


async def submit_all(broker: RedisStreamBroker, at_build: Callable[[], None]) -> None:
    AT_BUILD.append(at_build)
    messages = [
        TaskMessage(task_id=task_id, task_name="test:Observed", task_args=[number])
        for number, task_id in enumerate(IDS)
    ]
    await broker.submit([Submission(message, NORMAL) for message in messages])


def fetched_ahead(redis: SyncRedis) -> None:
    """Wait until the server has replied to the next fetch, while the event loop waits, too."""
    deadline = time.monotonic() + 30
    while redis.xpending(NORMAL, keys.GROUP)["pending"] < FETCHED_AHEAD:
        assert time.monotonic() < deadline, "the next fetch was not sent before the first tasks were built"
        time.sleep(0.002)


async def test_the_server_replies_to_the_next_fetch_while_tasks_are_built(
    system: TaskSystem, sync: SyncRedis
) -> None:
    await submit_all(system.broker, lambda: fetched_ahead(sync))
    await system.drain()
    assert not AT_BUILD
    assert Counter(range(ALL)) == STARTED


async def test_tasks_whose_fetch_has_lost_its_reply_run_once(system: TaskSystem, sync: SyncRedis) -> None:
    def lose_reply() -> None:
        fetched_ahead(sync)
        sync.client_kill_filter(_type="normal", skipme=True)

    await submit_all(system.broker, lose_reply)
    await until(lambda: len(STARTED) == ALL)  # without the connection of `drain`, which may be closed, too
    await system.drain()
    assert Counter(range(ALL)) == STARTED


async def test_a_worker_that_stops_requeues_what_it_has_fetched_ahead(
    redis_url: str, redis: Redis, sync: SyncRedis
) -> None:
    STARTED.clear()
    AT_BUILD.clear()
    broker, stop = RedisStreamBroker(redis_url), asyncio.Event()

    def stop_after_fetch() -> None:
        fetched_ahead(sync)
        stop.set()

    await submit_all(broker, stop_after_fetch)
    await Worker(broker, {"test:Observed": Observed}, max_concurrent_tasks=100).listen(stop)
    await broker.shutdown()
    assert sum(STARTED.values()) < FETCHED_AHEAD
    assert (await redis.xpending(NORMAL, keys.GROUP))["pending"] == 0
    async with TaskSystem([Observed], redis_url=redis_url, workers=1, scheduler=False) as another:
        await another.drain()
    assert Counter(range(ALL)) == STARTED


async def test_tasks_that_are_cancelled_after_they_were_fetched_ahead_end(
    redis_url: str, system: TaskSystem, sync: SyncRedis
) -> None:
    async def cancel() -> None:
        broker = RedisStreamBroker(redis_url)
        await broker.cancel(IDS[:FETCHED_AHEAD])
        await broker.shutdown()

    def cancel_fetched() -> None:
        fetched_ahead(sync)
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, cancel()).result()

    WAITING.update(range(FETCHED_AHEAD))
    await submit_all(system.broker, cancel_fetched)
    await system.drain()
    assert set(range(ALL)) - WAITING <= set(STARTED)


class LosesSecond(RedisStreamBroker):
    """Sends no second fetch: a proxy has taken it, and the connection to the proxy is lost."""

    fetches = 0

    async def send_fetch(self, free: int, **options: Any) -> FetchReply:
        self.fetches += 1
        return self._lose if self.fetches == 2 else await super().send_fetch(free, **options)

    async def _lose(self) -> Any:
        raise RedisConnectionError("connection lost")


@pytest.mark.leaves_keys("diracx:tasks:*")
async def test_tasks_are_recovered_that_a_lost_fetch_reserves_later(redis_url: str) -> None:
    broker, held = LosesSecond(redis_url, socket_timeout=1.0), LeasedDeliveries()
    intake = intake_of(broker, held=held)
    await broker.submit([submission(str(number)) for number in range(FETCHED_AHEAD)])
    held += await intake.next(100)
    with pytest.raises(RedisConnectionError):
        await intake.next(50)
    held += await intake.next(50)
    assert len(held) == FETCHED_AHEAD
    proxy = RedisStreamBroker(redis_url, consumer_name=broker.consumer_name)
    await proxy.submit([submission("late")])
    assert len((await proxy.fetch(50))[0]) == 1
    async with asyncio.timeout(30):
        while not (late := await intake.next(50)):
            pass
    assert [name_of(each) for each in late] == ["late"]
    for each in (broker, proxy):
        await each.shutdown()
