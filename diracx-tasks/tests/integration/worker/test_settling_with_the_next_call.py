"""Settlements that are sent in one write with the next fetch or blocking read of the worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import pytest
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.broker.models import Delivery, Settlement
from diracx.tasks.plumbing.worker.intake import Intake
from diracx.tasks.plumbing.worker.keeper import LeaseKeeper, PendingAck
from diracx.tasks.plumbing.worker.settler import Settler
from redis.asyncio import Redis
from support.intakes import NORMAL, in_hand, intake_of, name_of, submission
from support.leased_deliveries import LeasedDeliveries
from support.lossy_proxy import LossyProxy
from support.waiting import clients_wait, until

pytestmark = [pytest.mark.event_loops("asyncio", "uvloop"), pytest.mark.leaves_keys("diracx:tasks:*")]


@dataclass
class Parts:
    """The parts of a worker that settle and fetch."""

    broker: RedisStreamBroker
    keeper: LeaseKeeper
    held: LeasedDeliveries = field(default_factory=LeasedDeliveries)

    def __post_init__(self) -> None:
        self.intake: Intake = intake_of(self.broker, held=self.held)
        self.settler = Settler(self.broker, self.keeper, self.intake)

    async def fetch(self, task_id: str, free: int = 10) -> Delivery:
        await self.broker.submit([submission(task_id)])
        [delivery] = await self.intake.next(free)
        self.held.append(delivery)
        self.keeper.add([PendingAck(delivery)])
        return delivery

    async def settle_alone(self) -> None:
        settling = asyncio.create_task(self.settler.run())
        async with asyncio.timeout(30):
            await self.settler.drained()
        settling.cancel()

    def settle_with_the_next_wait(self, delivery: Delivery) -> asyncio.Task[list[Delivery]]:
        self.settler.add(Settlement(delivery))
        return asyncio.create_task(self.intake.next(10, self.settler))


@pytest.fixture
async def parts(redis_url: str) -> AsyncIterator[Parts]:
    broker = RedisStreamBroker(redis_url)
    keeper = LeaseKeeper(redis_url, broker.consumer_name, 600, asyncio.get_running_loop())
    async with keeper:
        parts = Parts(broker, keeper)
        parts.settler.add(Settlement(await parts.fetch("before")))
        await parts.settle_alone()  # later ones may be sent with other calls
        yield parts
    await broker.leave()
    await broker.shutdown()


async def ended(asked: asyncio.Task[list[Delivery]]) -> None:
    asked.cancel()
    await asyncio.wait([asked])


async def test_a_settlement_is_accepted_while_the_read_behind_it_still_waits(parts: Parts, redis: Redis) -> None:
    settling = parts.settle_with_the_next_wait(await parts.fetch("first"))
    async with asyncio.timeout(30):
        await parts.settler.drained()  # the settler itself does not run
    assert await in_hand(redis) == 0
    assert parts.keeper.held() == []
    assert not settling.done()
    await parts.broker.submit([submission("second")])
    assert [name_of(each) for each in await settling] == ["second"]


@pytest.mark.parametrize("known", [True, False], ids=["scripts loaded", "scripts unknown"])
async def test_a_settlement_is_sent_with_the_next_fetch(parts: Parts, redis: Redis, known: bool) -> None:
    first = await parts.fetch("first", free=1)  # as many as were asked for: there may be more, so it fetches again
    await parts.broker.submit([submission("second")])
    if not known:
        await redis.script_flush()
    parts.settler.add(Settlement(first))
    assert [name_of(each) for each in await parts.intake.next(1, parts.settler)] == ["second"]
    assert (parts.keeper.held() == []) == known
    await parts.settle_alone()
    assert parts.keeper.held() == []
    assert await in_hand(redis) == 1


async def test_a_settlement_that_is_refused_before_a_read_is_repeated_in_a_call_of_its_own(
    parts: Parts, redis: Redis
) -> None:
    delivery = await parts.fetch("first")
    await redis.script_flush()
    waiting = parts.settle_with_the_next_wait(delivery)
    await clients_wait(redis)
    assert await in_hand(redis) == 1
    await parts.settle_alone()
    assert await in_hand(redis) == 0
    assert not waiting.done()
    await ended(waiting)


async def test_a_settlement_before_a_read_is_refused_to_a_worker_that_has_lost_the_task(
    parts: Parts, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    lost, kept = await parts.fetch("first"), await parts.fetch("second")
    await redis.xclaim(NORMAL, keys.GROUP, "another", 0, [lost.entry])
    parts.settler.add(Settlement(kept))
    waiting = parts.settle_with_the_next_wait(lost)
    await until(lambda: len(parts.keeper.held()) != 2)
    await parts.settle_alone()
    refused = [each.entry for each in (kept, lost) if f"{each.entry} cannot be settled" in caplog.text]
    assert refused == [lost.entry]
    assert await in_hand(redis) == 1
    await ended(waiting)


async def test_a_settlement_whose_read_is_interrupted_is_sent_again(parts: Parts, redis: Redis) -> None:
    waiting = parts.settle_with_the_next_wait(await parts.fetch("first"))
    await asyncio.sleep(0)
    await ended(waiting)
    await parts.settle_alone()
    assert await in_hand(redis) == 0


async def test_a_settlement_does_not_wait_for_the_end_of_a_dead_connection(redis_url: str, redis: Redis) -> None:
    """A firewall may have dropped a connection that was unused while long tasks ran."""
    proxy = LossyProxy(redis_url)
    async with AsyncExitStack() as stack:
        broker = RedisStreamBroker(await stack.enter_async_context(proxy.serve()))
        stack.push_async_callback(broker.shutdown)
        keeper = LeaseKeeper(redis_url, broker.consumer_name, 600, asyncio.get_running_loop())
        parts = Parts(broker, await stack.enter_async_context(keeper))
        parts.settler.add(Settlement(await parts.fetch("before")))
        await parts.settle_alone()
        delivery = await parts.fetch("first")
        await broker.close_spare_connections(0, keep=0)
        proxy.stop_replying()
        waiting = parts.settle_with_the_next_wait(delivery)
        await asyncio.sleep(0)
        async with asyncio.timeout(broker.reply_timeout_seconds / 2):
            await parts.settle_alone()
        assert await in_hand(redis) == 0
        await ended(waiting)
        await broker.leave()


async def test_a_reply_that_comes_after_the_repetition_changes_nothing(
    parts: Parts, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    delivery = await parts.fetch("first")
    await redis.client_pause(7_000)
    waiting = parts.settle_with_the_next_wait(delivery)
    await asyncio.sleep(0)
    async with asyncio.timeout(30):
        await parts.settle_alone()
    assert await in_hand(redis) == 0
    assert parts.keeper.held() == []
    assert not waiting.done()
    assert f"{delivery.entry} was settled by an earlier call, whose reply was lost" in caplog.text
    assert "another worker" not in caplog.text
    await ended(waiting)
