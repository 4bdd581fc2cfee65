"""Poison candidates run alone, so that no other task is blamed for the next crash."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.broker.models import Delivery, Settlement, TaskMessage, is_poison_candidate
from diracx.tasks.plumbing.broker.replies import ACCEPTED
from diracx.tasks.plumbing.worker.intake import Intake
from diracx.tasks.plumbing.worker.settings import WorkerSettings
from diracx.tasks.plumbing.worker.settlement import requeue
from redis.asyncio import Redis
from support.intakes import NORMAL, SaysOnce, in_hand, name_of, submission
from support.leased_deliveries import LeasedDeliveries
from support.waiting import until

# What is in hand, or still queued, when the test ends.
pytestmark = [pytest.mark.leaves_keys("diracx:tasks:*"), pytest.mark.event_loops("asyncio", "uvloop")]


class Hands:
    """An intake with the deliveries of its worker."""

    def __init__(self, broker: RedisStreamBroker) -> None:
        self.broker = broker
        self.held = LeasedDeliveries()
        self.intake = Intake(broker, WorkerSettings(), asyncio.Event(), self.held, self.held)

    async def take(self, free: int = 10) -> list[Delivery]:
        taken = await self.intake.next(free)
        self.held += taken
        return taken

    async def settle(self) -> None:
        settled = self.held.copy()
        self.held.clear()
        assert set(await self.broker.settle([Settlement(each) for each in settled])) <= {ACCEPTED}
        self.intake.settled(settled)


async def poison_candidates(redis_url: str, redis: Redis, *names: str) -> None:
    """Two workers have died with these."""
    first, second = (RedisStreamBroker(redis_url, consumer_name=name) for name in ("first", "second"))
    await first.submit([submission(name) for name in names])
    assert len((await first.fetch(len(names)))[0]) == len(names)
    await redis.zadd(keys.ALIVE, {"first": 0})
    assert len((await second.reclaim(len(names)))[0]) == len(names)
    await redis.zadd(keys.ALIVE, {"second": 0})
    for each in (first, second):
        await each.shutdown()


@pytest.fixture
async def patient(redis_url: str) -> AsyncIterator[Hands]:
    broker = SaysOnce(redis_url)
    yield Hands(broker)
    await broker.shutdown()


async def test_P9_the_next_poison_candidate_starts_when_the_last_is_settled(
    redis_url: str, redis: Redis, patient: Hands
) -> None:
    await poison_candidates(redis_url, redis, *"abc")
    for _ in "abc":
        assert len(await patient.take()) == 1, "one at a time, and each without delay"
        fetching = asyncio.create_task(patient.take())
        await asyncio.sleep(0)
        await patient.settle()
        assert await fetching == []


async def test_P9_a_worker_with_a_poison_candidate_fetches_nothing_else(
    redis_url: str, redis: Redis, patient: Hands
) -> None:
    await poison_candidates(redis_url, redis, "candidate")
    assert len(await patient.take()) == 1
    await patient.broker.submit([submission("fresh")])
    fetching = asyncio.create_task(patient.take())
    for _ in range(20):  # each is a round trip
        await redis.ping()
    assert not fetching.done()
    assert await in_hand(redis) == 1, "only the poison candidate"
    await patient.settle()
    assert await fetching == []
    assert len(await patient.take()) == 1


async def test_P9_a_busy_worker_drains_for_a_poison_candidate(
    redis_url: str, redis: Redis, patient: Hands
) -> None:
    await patient.broker.submit([submission("at work")])
    assert len(await patient.take()) == 1
    await poison_candidates(redis_url, redis, "candidate")
    patient.intake.reclaim_at = 0.0  # the lease of the dead one has ended
    await patient.broker.submit([submission("fresh")])
    fetching = asyncio.create_task(patient.take())
    await until(lambda: redis.exists(keys.DRAINING_PREFIX + patient.broker.streams[0]))
    for _ in range(20):
        await redis.ping()
    assert not fetching.done()
    await patient.settle()
    assert await fetching == []
    [candidate] = await patient.take()
    assert candidate.redelivery_count == 2
    assert not await redis.exists(keys.DRAINING_PREFIX + patient.broker.streams[0])


@pytest.mark.parametrize("beside", ["a task at work", "a task that comes with it", "a poison candidate"])
async def test_P9_a_poison_candidate_from_a_queue_runs_alone(
    redis_url: str, redis: Redis, patient: Hands, beside: str
) -> None:
    """The candidate has waited for a lock, or was requeued by a worker that stopped."""
    names = ("candidate", "another") if beside == "a poison candidate" else ("candidate",)
    if beside != "a task that comes with it":
        await patient.broker.submit([submission("at work")])
        assert len(await patient.take()) == 1
    await poison_candidates(redis_url, redis, *names)
    stopping = Hands(SaysOnce(redis_url))
    for _ in names:
        candidates = await stopping.take()
        assert set(await stopping.broker.settle([requeue(each) for each in candidates])) <= {ACCEPTED}
        stopping.held.clear()
    await stopping.broker.shutdown()
    if beside == "a task that comes with it":
        await patient.broker.submit([submission("fresh")])
        assert [TaskMessage.loadb(each.data or b"").task_id for each in await patient.take()] == ["fresh"]
    else:
        assert await patient.take() == [], "it waits until this worker has nothing else"
    for _ in names:
        await patient.settle()
        while not patient.held:
            await patient.take()
        [candidate] = patient.held
        assert is_poison_candidate(candidate, 3), "as before: no worker was lost with it meanwhile"
    assert not any(b":aside" in name for name in await redis.zrange(keys.ALIVE, 0, -1))


async def test_P9_a_poison_candidate_that_was_fetched_ahead_runs_alone(
    redis_url: str, redis: Redis, patient: Hands
) -> None:
    await patient.broker.submit([submission(str(number)) for number in range(50)])
    await redis.xadd(NORMAL, {"data": submission("candidate").message.dumpb(), "deaths": 2})
    assert len(await patient.take(51)) == 50
    assert patient.intake.fetches_ahead
    await patient.settle()
    assert [name_of(each) for each in await patient.take(51)] == ["candidate"]
    await patient.broker.submit([submission("fresh")])
    fetching = asyncio.create_task(patient.take())
    for _ in range(20):
        await redis.ping()
    assert not fetching.done()
    assert await in_hand(redis) == 1, "only the poison candidate"
    await patient.settle()
    assert await fetching == []


async def test_P9_a_healthy_task_among_poison_is_never_classified_as_poison(redis_url: str, redis: Redis) -> None:
    """Every worker fetches tasks, and dies with poison; new poison arrives all the time."""
    innocent, poisoned, poison, worker = False, 0, 0, 0
    broker = RedisStreamBroker(redis_url)
    await broker.submit([submission("innocent")])
    while not innocent or poisoned < 5:
        worker += 1
        assert worker < 100
        hands = Hands(RedisStreamBroker(redis_url, consumer_name=f"{worker}"))
        if poison < 8:
            await broker.submit([submission(f"poison {poison}"), submission(f"poison {poison + 1}")])
            poison += 2
        await let_leases_pass(redis, hands.broker.streams)
        await hands.take()
        fetching = asyncio.create_task(hands.take())
        for _ in range(50):
            await redis.ping()
        fetching.cancel()
        await asyncio.wait({fetching})
        hands.held += await hands.broker.fetch_unacknowledged([(each.stream, each.entry) for each in hands.held])
        if all(each.redelivery_count >= 3 or name_of(each) == "innocent" for each in hands.held):
            for each in hands.held:
                assert name_of(each) != "innocent" or each.redelivery_count < 3
                innocent, poisoned = (
                    innocent or name_of(each) == "innocent",
                    poisoned + (each.redelivery_count >= 3),
                )
            await hands.settle()
        await redis.zadd(keys.ALIVE, {f"{worker}": 0})
        await hands.broker.shutdown()
    await broker.shutdown()


async def let_leases_pass(redis: Redis, streams: Sequence[str]) -> None:
    """Let the leases pass for which the last worker of a poison task is waited for."""
    for stream in streams:
        if await redis.exists(stream) and await redis.xinfo_groups(stream):
            for each in await redis.xpending_range(stream, keys.GROUP, "-", "+", 1000):
                entry, dead = each["message_id"], each["consumer"]
                await redis.xclaim(stream, keys.GROUP, dead, 0, [entry], idle=3_600_000, justid=True)
