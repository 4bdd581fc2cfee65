"""Recovery of the deliveries of a lost worker after its lease, in order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from diracx.tasks.plumbing import Priority, Size
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.broker.models import Delivery, Settlement, Submission, TaskMessage
from diracx.tasks.plumbing.broker.redis_streams import stream_name_for
from diracx.tasks.plumbing.broker.replies import ACCEPTED
from diracx.tasks.plumbing.worker.intake import Intake
from diracx.tasks.plumbing.worker.settings import WorkerSettings
from redis.asyncio import Redis
from support.leased_deliveries import LeasedDeliveries

# Tasks that are not settled when the test ends.
pytestmark = pytest.mark.leaves_keys("diracx:tasks:*")

Worker = Callable[..., Awaitable[RedisStreamBroker]]


async def submit(broker: RedisStreamBroker, *names: str, priority: Priority = Priority.NORMAL) -> None:
    stream = stream_name_for(priority, broker.streams[1].rpartition(":")[2])
    messages = [TaskMessage(task_id=name, task_name="test:Task") for name in names]
    await broker.submit([Submission(message, stream) for message in messages])


async def die_with(redis: Redis, broker: RedisStreamBroker, *names: str) -> None:
    """The worker takes these, and its lease ends."""
    await submit(broker, *names)
    await die(redis, broker, len(names))


async def die(redis: Redis, broker: RedisStreamBroker, held: int) -> None:
    assert len((await broker.fetch(held))[0]) == held
    await redis.zadd(keys.ALIVE, {broker.consumer_name: 1})


def names(deliveries: list[Delivery]) -> list[str]:
    return [TaskMessage.loadb(delivery.data or b"").task_id for delivery in deliveries]


async def test_P9_tasks_of_a_lost_worker_are_fetched_before_new_ones(worker: Worker, redis: Redis) -> None:
    dead, other = await worker("1"), await worker("2")
    left = {str(number) for number in range(250)}
    await die_with(redis, dead, *left)
    await submit(other, "new")
    for free in (100, 1, 100, 49):
        taken, again_seconds, _ = await other.reclaim(free)
        assert [delivery.deliveries for delivery in taken] == [2] * free
        left -= set(names(taken))
        assert (again_seconds == 0) == bool(left), "with the next free slot, while something is left"
    assert not left


async def test_P9_a_busy_worker_reclaims_tasks_with_each_free_slot_without_waiting(
    worker: Worker, redis: Redis
) -> None:
    dead, other = await worker("1"), await worker("2")
    left = [str(number) for number in range(20)]
    await die_with(redis, dead, *left)
    await submit(other, *(f"new {number}" for number in range(20)))
    held = LeasedDeliveries()
    intake = Intake(other, WorkerSettings(), asyncio.Event(), held, held)
    held += await intake.next(4)
    begun = names(held)
    while len(begun) < len(left):
        ended = held.pop(0)
        assert await other.settle([Settlement(ended)]) == [ACCEPTED]
        intake.settled([ended])
        [delivery] = await intake.next(1)
        held.append(delivery)
        begun += names([delivery])
    assert begun == left, "nothing new in between"


async def test_P4_P9_new_urgent_tasks_precede_those_of_a_dead_worker(worker: Worker, redis: Redis) -> None:
    dead, other = await worker("1"), await worker("2")
    for priority in Priority:
        await submit(dead, f"left {priority}", priority=priority)
    await submit(dead, "left normal 2")
    await die(redis, dead, 4)
    for priority in Priority:
        await submit(dead, f"new {priority}", priority=priority)
    taken: list[str] = []
    for _ in range(3):
        taken += names((await other.reclaim(2))[0])
    assert taken == [
        "left realtime", "new realtime", "left normal", "left normal 2", "new normal", "left background"
    ]  # fmt: skip
    assert names((await other.fetch(10))[0]) == ["new background"]
    assert other.counts.reclaimed == {
        "diracx:tasks:realtime:medium": 1,
        "diracx:tasks:normal:medium": 2,
        "diracx:tasks:background:medium": 1,
    }


@pytest.mark.parametrize(
    ("left", "at_most_seconds"),
    [("nothing", 40), ("ordinary tasks of another size", 40), ("a poison candidate", 1)],
)
async def test_P9_a_worker_polls_at_the_end_of_the_next_lease_and_each_second_while_a_poison_candidate_waits(
    worker: Worker, redis: Redis, left: str, at_most_seconds: float
) -> None:
    looks = await worker("looks")
    await submit(looks, "at work")
    assert len((await looks.fetch(1))[0]) == 1
    await worker("lives", 40)
    if left == "ordinary tasks of another size":
        await die_with(redis, await worker("small", size=Size.SMALL), "small")
    elif left == "a poison candidate":
        await die_with(redis, await worker("1"), "candidate")
        second = await worker("2")
        assert len((await second.reclaim(1))[0]) == 1
        await redis.zadd(keys.ALIVE, {"2": 1})
    taken, again_seconds, draining = await looks.reclaim(1, lease_seconds=600)
    assert taken == []
    assert draining == (left == "a poison candidate")
    assert at_most_seconds / 2 < again_seconds <= at_most_seconds + 0.002


async def test_P9_a_lease_that_ends_sooner_is_reclaimed_at_its_end_while_a_poison_candidate_waits(
    worker: Worker, redis: Redis
) -> None:
    looks = await worker("looks")
    await submit(looks, "at work")
    assert len((await looks.fetch(1))[0]) == 1
    await die_with(redis, await worker("1"), "candidate")
    second = await worker("2")
    assert len((await second.reclaim(1))[0]) == 1
    await redis.zadd(keys.ALIVE, {"2": 1})
    await worker("ends soon", 0.5)
    _, again_seconds, _ = await looks.reclaim(1, lease_seconds=600)
    assert again_seconds <= 0.502


async def test_P9_a_worker_with_many_slots_reclaims_in_batches_without_pauses_between_them(
    worker: Worker, redis: Redis
) -> None:
    """While it begins one portion, others may take the next one; and no step holds the server up for long."""
    await die_with(redis, await worker("1"), *(str(number) for number in range(120)))
    intake = Intake(await worker("2"), WorkerSettings(), asyncio.Event(), LeasedDeliveries(), ())
    assert [len(await intake.next(1000)) for _ in range(3)] == [50, 50, 20]
