"""Deliveries whose response was lost are found before the lease expires."""

from __future__ import annotations

import asyncio

import pytest
from diracx.tasks.plumbing.broker import RedisStreamBroker
from redis.asyncio import Redis
from support.intakes import intake_of, name_of, submission
from support.leased_deliveries import LeasedDeliveries
from support.waiting import clients_wait

# What is in hand, or still queued, when the test ends.
pytestmark = [pytest.mark.leaves_keys("diracx:tasks:*"), pytest.mark.event_loops("asyncio", "uvloop")]


async def forgotten(broker: RedisStreamBroker) -> None:
    """Leave a task with us that we do not know of, as a new primary does that missed our settlement."""
    await broker.submit([submission("settled and lost")])
    same = RedisStreamBroker(broker.url, consumer_name=broker.consumer_name)
    assert len((await same.fetch(1, lease_seconds=30))[0]) == 1
    await same.shutdown()


async def test_an_unacknowledged_task_is_recovered_when_a_failover_ends_the_wait(
    broker: RedisStreamBroker, redis: Redis
) -> None:
    await forgotten(broker)
    fetching = asyncio.create_task(intake_of(broker).next(10))
    await clients_wait(redis)
    [waiting] = [client["id"] for client in await redis.client_list() if client["cmd"] == "xreadgroup"]
    await redis.execute_command("CLIENT", "UNBLOCK", waiting, "ERROR")  # as a primary does that becomes a replica
    assert [name_of(each) for each in await fetching] == ["settled and lost"]


async def test_an_unacknowledged_task_is_recovered_after_a_reconnect_of_a_busy_worker(
    broker: RedisStreamBroker, redis: Redis
) -> None:
    """A worker at work does not wait for the server while it fails over: no call of it fails."""
    running = LeasedDeliveries()
    intake = intake_of(broker, held=running)
    await broker.submit([submission("running")])
    running += await intake.next(10)
    assert [name_of(each) for each in running] == ["running"]
    await forgotten(broker)
    await redis.client_kill_filter(_type="normal", skipme=True)
    await broker.redis.ping()  # as the renewals of the lease do
    assert [name_of(each) for each in await intake.next(10)] == ["settled and lost"]


async def test_an_unacknowledged_task_is_recovered_with_the_next_audit(broker: RedisStreamBroker) -> None:
    """The failover may go unnoticed, as behind a proxy that keeps our connections open."""
    intake = intake_of(broker, lease_seconds=0.5)
    assert await intake.next(10) == []
    await forgotten(broker)
    async with asyncio.timeout(20):
        while not (deliveries := await intake.next(10)):
            pass
    assert [name_of(each) for each in deliveries] == ["settled and lost"]
