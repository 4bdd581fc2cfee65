"""Lost responses: connections that break after the server acted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from diracx.tasks.plumbing import BaseTask, ExponentialBackoff
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.broker.models import Settlement, Submission, TaskMessage
from diracx.tasks.plumbing.broker.replies import SettleReply
from diracx.tasks.plumbing.registry import TaskRegistry
from diracx.tasks.plumbing.worker import Worker
from diracx.tasks.plumbing.worker.keeper import LeaseKeeper
from diracx.tasks.plumbing.worker.settings import WorkerSettings
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from support.lossy_proxy import LossyProxy
from support.standard_tasks import SEEN, Named
from support.waiting import clients_wait, until

pytestmark = pytest.mark.event_loops("asyncio", "uvloop")

NORMAL = "diracx:tasks:normal:medium"


@asynccontextmanager
async def behind_a_lossy_proxy(
    task: type[BaseTask], redis_url: str, **settings: float
) -> AsyncIterator[tuple[LossyProxy, TaskSystem]]:
    """A worker connected through the proxy; the submitter is connected directly."""
    proxy, stop = LossyProxy(redis_url), asyncio.Event()
    async with proxy.serve() as lossy_url, TaskSystem([task], redis_url=redis_url, workers=0) as system:
        broker = RedisStreamBroker(lossy_url)
        registry = TaskRegistry({f"test:{task.__name__}": task})
        worker = Worker(broker, registry, settings=WorkerSettings(result_ttl_seconds=60, **settings))
        running = asyncio.create_task(worker.run(stop))
        await worker.ready.wait()
        yield proxy, system
        stop.set()
        await running
        await broker.shutdown()
        await system.drain()


async def test_P6_a_message_that_was_reserved_without_a_reply_is_executed_once(redis_url: str) -> None:
    SEEN.clear()
    async with behind_a_lossy_proxy(Named, redis_url) as (proxy, system):
        await clients_wait(system.broker.redis)
        # The worker waits now, and the reply that wakes it hands the message over.
        proxy.lose(1, b"once-and-only-once")
        task_id = await Named("once-and-only-once").schedule()
        result = await system.result(task_id, timeout=60)
        assert proxy.lost.is_set()
        assert result.return_value == "once-and-only-once"
        for text in ("afterwards", "and again"):
            await system.result(await Named(text).schedule(), timeout=60)
    assert SEEN == ["once-and-only-once", "afterwards", "and again"]


async def test_P6_a_message_sent_to_a_lost_connection_is_executed(redis_url: str, redis: Redis) -> None:
    SEEN.clear()
    async with behind_a_lossy_proxy(Named, redis_url, lease_seconds=3) as (proxy, system):
        async with asyncio.timeout(20):
            await clients_wait(redis)
            proxy.forget()
            await clients_wait(redis, 2)
            submitted = [await Named(text).schedule() for text in ("a", "b")]
            for task_id in submitted:
                await system.result(task_id)
    assert sorted(SEEN) == ["a", "b"]


async def test_P6_a_settlement_without_a_reply_is_repeated_and_counts_once(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    SEEN.clear()
    async with behind_a_lossy_proxy(Named, redis_url) as (proxy, system):
        for nth in range(3, 7):  # whichever reply is lost: of the fetch, the locks, the settlement
            proxy.lose(nth, b"")
            task_id = await Named(f"number {nth}").schedule()
            await system.result(task_id, timeout=60)
            await asyncio.wait_for(proxy.lost.wait(), 60)
    assert [SEEN.count(f"number {nth}") for nth in range(3, 7)] == [1] * 4
    assert "another worker" not in caplog.text


@dataclass
class Fragile(BaseTask):
    """Fails once, and then succeeds."""

    text: str
    retry_policy = ExponentialBackoff(base_delay_seconds=0.05, max_retries=1)

    async def execute(self) -> str:
        SEEN.append(self.text)
        if SEEN.count(self.text) == 1:
            raise ValueError("not yet")
        return self.text


async def test_P11_a_retry_with_a_lost_reply_happens_once(redis_url: str) -> None:
    SEEN.clear()
    async with behind_a_lossy_proxy(Fragile, redis_url) as (proxy, system):
        for nth in range(1, 6):  # whichever reply it is, that of the settlement with the retry included
            proxy.lose(nth, b"")
            task_id = await Fragile(f"number {nth}").schedule()
            assert (await system.result(task_id, timeout=60)).return_value == f"number {nth}"
    assert [SEEN.count(f"number {nth}") for nth in range(1, 6)] == [2] * 5


async def test_a_silent_connection_of_the_control_channel_is_replaced(redis_url: str) -> None:
    proxy, received = LossyProxy(redis_url), asyncio.Event()
    direct = RedisStreamBroker(redis_url)
    loop = asyncio.get_running_loop()
    async with (
        proxy.serve() as silent_url,
        LeaseKeeper(silent_url, "mine", 0.6, loop, [keys.CANCELLED], lambda channel, data: received.set()),
    ):
        proxy.stop_replying()
        async with asyncio.timeout(60):
            while not received.is_set():
                await direct.redis.execute_command("PUBLISH", keys.CANCELLED, "task")
                await asyncio.sleep(0.01)
    await direct.leave()
    await direct.redis.delete(keys.ALIVE, keys.LEASES, keys.DATASET_ID)
    await direct.shutdown()


@dataclass
class Endless(BaseTask):
    async def execute(self) -> None:
        await asyncio.Event().wait()


def endless(task_id: str) -> Submission:
    return Submission(TaskMessage(task_id=task_id, task_name="test:Endless"), NORMAL)


class AddsTasks(RedisStreamBroker):
    """Submits a task behind each settlement of a worker that stops, and before it signs off."""

    def __init__(self, url: str, stop: asyncio.Event, direct: RedisStreamBroker) -> None:
        super().__init__(url)
        self._stopping, self._direct = stop, direct
        self.added = 0

    async def _add_one(self) -> None:
        if self._stopping.is_set():
            self.added += 1
            await self._direct.submit([endless(f"{self.added}")])

    async def settle(self, settlements: Sequence[Settlement], dataset_id: str = "") -> list[SettleReply]:
        replies = await super().settle(settlements, dataset_id)
        await self._add_one()
        return replies

    async def leave(self) -> bool:
        await self._add_one()
        return await super().leave()


@pytest.mark.leaves_keys("diracx:tasks:*")
@pytest.mark.parametrize("running", [0, 1, 3])
async def test_nothing_is_delivered_to_a_worker_that_requeues_its_deliveries(
    redis_url: str, redis: Redis, running: int
) -> None:
    """Also if the server does not detect the end of a waiting connection."""
    proxy, stop, direct = LossyProxy(redis_url), asyncio.Event(), RedisStreamBroker(redis_url)
    async with proxy.serve() as url:
        broker = AddsTasks(url, stop, direct)
        settings = WorkerSettings(grace_seconds=0)
        worker = Worker(broker, TaskRegistry({"test:Endless": Endless}), settings=settings)
        working = asyncio.create_task(worker.run(stop))
        await worker.ready.wait()
        for number in range(running):
            await direct.submit([endless(f"running {number}")])
        await until(lambda: len(worker._running) >= running)
        await clients_wait(redis)
        proxy.keep_open()
        stop.set()
        await working
        await broker.shutdown()
    deliveries, _ = await direct.fetch(100)
    assert len(deliveries) == running + broker.added, "all of them are in the queue"
    assert {delivery.deliveries for delivery in deliveries} == {1}
    assert broker.added >= 1 + bool(running), "a task came at every step"
    assert await redis.zcard(keys.ALIVE) == 0
    await direct.shutdown()
