"""Regression tests of single broker steps, found by the model and by chaos."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from diracx.tasks.plumbing import ExclusiveRWLock, MutexLock, SharedRWLock
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.broker.models import Delivery, Settlement, Submission, TaskMessage
from diracx.tasks.plumbing.broker.replies import ACCEPTED, DATA_LOST, TAKEN_OVER
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.plumbing.worker.keeper import LeaseKeeper, PendingAck
from diracx.tasks.plumbing.worker.settlement import defer, defer_to_newer_worker, requeue
from redis.asyncio import Redis
from support.silent_worker import stays_silent
from support.start_requests import start_request

QUEUE = "diracx:tasks:normal:medium"
LATER_MS = 600_000

Worker = Callable[[str], Awaitable[RedisStreamBroker]]


async def dies(redis: Redis, broker: RedisStreamBroker) -> None:
    await redis.zadd(keys.ALIVE, {broker.consumer_name: 1})


async def died(redis: Redis, dead: RedisStreamBroker, finder: RedisStreamBroker) -> None:
    """Let a worker be dead for several leases, with its death detected."""
    await dies(redis, dead)
    assert (await finder.reclaim(10, max_deliveries=1))[0] == [], "it may yet come back"
    stays_silent(finder.url, dead.consumer_name)


async def submit(broker: RedisStreamBroker, *names: str) -> None:
    messages = [TaskMessage(task_id=name, task_name="test:Task") for name in names]
    await broker.submit([Submission(message, QUEUE) for message in messages])


async def start(broker: RedisStreamBroker, delivery: Delivery, locks: Sequence[BaseLock]) -> tuple[bool, Any]:
    wanted = start_request(delivery, locks, LATER_MS)
    [reply] = await broker.start([wanted])
    return reply.granted, wanted["locks"]


def both(first: str, second: str) -> list[BaseLock]:
    return [MutexLock(JOB, first), MutexLock(JOB, second)]


@pytest.mark.leaves_keys("diracx:tasks:*", "lock:*")
async def test_P25_tasks_that_need_the_same_two_locks_do_not_livelock(worker: Worker, redis: Redis) -> None:
    broker = await worker("a")
    holders = both("x", "y")
    for holder in holders:
        assert await holder.acquire(redis)
    await submit(broker, "first", "second", "third", "fourth")
    first, second, third, fourth = (await broker.fetch(4))[0]
    assert not (await start(broker, first, both("x", "y")))[0]
    assert not (await start(broker, second, both("y", "x")))[0]
    assert not (await start(broker, third, both("x", "y")))[0]
    assert not (await start(broker, fourth, both("y", "x")))[0]
    for holder in holders:
        await holder.release(redis)  # x is granted to `first`, y to `second`
    first, second = (await broker.fetch(4))[0]
    assert not (await start(broker, second, both("y", "x")))[0], "x is reserved for one who stands before it"
    # Then y was granted to `fourth`, who stands behind `first`.
    granted, locks = await start(broker, first, both("x", "y"))
    assert granted, "no task holds a lock or is before it in line"
    ended = {first.data}
    while True:  # some task always gets on
        await broker.settle([Settlement(first, locks=locks)])
        begun = []
        for delivery in (await broker.fetch(4))[0]:
            granted, specs = await start(broker, delivery, both("x", "y"))
            begun += [(delivery, specs)] if granted else []
        if not begun:
            break
        [(first, locks)] = begun
        ended.add(first.data)
    assert len(ended) == 4


@pytest.mark.leaves_keys("diracx:tasks:*", "lock:*")
async def test_P25_a_retry_waits_for_its_delay_although_the_task_once_waited_for_a_lock(
    worker: Worker, redis: Redis
) -> None:
    broker = await worker("a")
    lock = MutexLock(JOB, "x")
    assert await lock.acquire(redis)
    await submit(broker, "t")
    [delivery], _ = await broker.fetch(1)
    parked = not (await start(broker, delivery, [MutexLock(JOB, "x")]))[0]
    assert parked
    await redis.delete(lock.redis_key)  # it expires: no task is granted it, the timer brings the task back
    await redis.zadd(keys.DELAYED, {"t": 0})
    await broker.promote()
    [delivery], _ = await broker.fetch(1)
    granted, locks = await start(broker, delivery, [MutexLock(JOB, "x")])
    assert granted
    assert not await redis.exists(f"{keys.WAITING_PREFIX}medium:{lock.redis_key}")
    retry = {"task": "t", "delay_ms": LATER_MS, "stream": QUEUE, "data": delivery.data}
    # Even where the line still shows it.
    await redis.zadd(f"{keys.WAITING_PREFIX}medium:{lock.redis_key}", {"mutex:t": 1})
    assert await broker.settle([Settlement(delivery, locks=locks, retry=retry)]) == [ACCEPTED]
    assert await redis.zscore(keys.DELAYED, "t") is not None
    assert (await broker.fetch(1))[0] == []


@pytest.mark.leaves_keys("diracx:tasks:*")
async def test_P9_neighbours_of_a_poison_task_become_no_dead_letters(worker: Worker, redis: Redis) -> None:
    first = await worker("1")
    await submit(first, *"abcde")
    assert len((await first.fetch(5))[0]) == 5
    await dies(redis, first)
    second = await worker("2")
    assert len((await second.reclaim(10))[0]) == 5, "one crash makes no task a candidate: all start again at once"
    await dies(redis, second)
    third, fourth = await worker("3"), await worker("4")
    [candidate], *_ = await third.reclaim(10)
    [other], *_ = await fourth.reclaim(10)
    assert (candidate.redelivery_count, other.redelivery_count) == (2, 2)
    assert (await third.reclaim(10))[0] == [], "one at a time"
    await dies(redis, third)  # `candidate` was it
    assert await fourth.settle([Settlement(other)]) == [ACCEPTED]
    begun = {other.data}
    while taken := (await fourth.reclaim(10, max_deliveries=4))[0]:
        assert len(taken) == 1
        assert taken[0].redelivery_count == (3 if taken[0].data == candidate.data else 2)
        begun.add(taken[0].data)
        await fourth.settle([Settlement(taken[0])])
    assert len(begun) == 5
    assert await redis.zrange(keys.ALIVE, 0, -1) == [b"4"]


@pytest.mark.leaves_keys("diracx:tasks:*")
async def test_P9_a_poison_candidate_is_the_only_running_task_of_its_worker(worker: Worker, redis: Redis) -> None:
    first, second = await worker("1"), await worker("2")
    await submit(first, "candidate")
    await first.fetch(1)
    await dies(redis, first)
    await second.reclaim(1)
    await submit(first, "neighbour")
    await second.fetch(1)
    third, fourth = await worker("3"), await worker("4")
    for each in (third, fourth):
        await submit(each, "fresh")
        await each.fetch(1)
    await dies(redis, second)
    taken, _, draining = await third.reclaim(10)
    assert ([delivery.redelivery_count for delivery in taken], draining) == ([1], True)
    assert (await fourth.reclaim(10))[::2] == ([], False), "one drains, the others go on"
    idle = await worker("idle")
    [candidate], _, draining = await idle.reclaim(10)
    assert (candidate.redelivery_count, draining) == (2, False)
    await dies(redis, third)  # with two that are no poison candidates
    assert (await idle.reclaim(10))[0] == []
    assert len((await fourth.reclaim(10))[0]) == 1, "the other is a poison candidate by now"


@pytest.mark.leaves_keys("diracx:tasks:*")
async def test_P9_reclaiming_more_tasks_of_a_worker_than_one_batch_creates_no_poison_candidates(
    worker: Worker, redis: Redis
) -> None:
    first, second, busy = [await worker(name) for name in ("first", "second", "busy")]
    await submit(first, "candidate")
    await first.fetch(1)
    await dies(redis, first)
    assert len((await second.reclaim(1))[0]) == 1
    await submit(busy, *(f"runs {number}" for number in range(300)))
    for _ in range(6):
        assert len((await busy.fetch(50))[0]) == 50
    await submit(second, "ordinary")
    assert len((await second.fetch(1))[0]) == 1
    await dies(redis, second)
    taken, _, draining = await busy.reclaim(10)
    assert [each.redelivery_count for each in taken] == [1], "the ordinary one"
    assert draining, "for the poison candidate"


@pytest.mark.leaves_keys("diracx:tasks:*")
async def test_P9_a_task_that_will_not_run_again_waits_for_no_poison_candidate(
    worker: Worker, redis: Redis
) -> None:
    broker = await worker("1")
    await submit(broker, *"abcd")
    await broker.fetch(10)
    for name in "23":
        before, broker = broker, await worker(name)
        await died(redis, before, broker)
        await broker.reclaim(10, max_deliveries=1)  # so that it takes all of them
        if name == "2":
            await submit(broker, "candidate", "another")
            await broker.fetch(10)
    last = await worker("last")
    await died(redis, broker, last)
    taken, *_ = await last.reclaim(10, max_deliveries=3)
    assert [delivery.redelivery_count for delivery in taken] == [3, 3, 3, 3, 2]
    assert (await last.reclaim(10, max_deliveries=3))[0] == [], "the other poison candidate waits"


@pytest.mark.leaves_keys("diracx:tasks:*")
async def test_P9_a_poison_task_by_earlier_redeliveries_waits_for_no_poison_candidate(
    worker: Worker, redis: Redis
) -> None:
    first, second, third = await worker("1"), await worker("2"), await worker("3")
    await submit(first, "poison", "candidate", "another")
    parked, *others = (await first.fetch(3))[0]
    assert parked.data is not None
    assert await first.settle([Settlement(parked)]) == [ACCEPTED]
    await redis.xadd(parked.stream + keys.RESUMED_SUFFIX, {"data": parked.data, "deaths": 1})  # its worker died
    others += (await first.fetch(1))[0]
    await died(redis, first, second)
    assert len((await second.reclaim(10, max_deliveries=1))[0]) == 3
    await died(redis, second, third)
    taken, *_ = await third.reclaim(10, max_deliveries=3)
    poison = [delivery for delivery in taken if delivery.redelivery_count == 3]
    assert len(poison) == 1, "two lost workers here, and one before"
    assert len(taken) == 2, "one poison candidate at a time"
    assert (await third.reclaim(10, max_deliveries=3))[0] == [], "the other poison candidate waits"


@pytest.mark.leaves_keys("diracx:tasks:*", "lock:*")
@pytest.mark.parametrize("way", ["parked", "handed back", "deferred"])
async def test_P9_the_redelivery_count_is_kept_when_a_task_is_parked_requeued_or_deferred(
    worker: Worker, redis: Redis, way: str
) -> None:
    first, second = await worker("1"), await worker("2")
    await submit(first, "t")
    for round_ in range(1, 4):
        [delivery], _ = await first.fetch(1)
        assert delivery.redelivery_count == round_ - 1
        await died(redis, first, second)
        [delivery], *_ = await second.reclaim(1)
        assert (delivery.deliveries, delivery.redelivery_count) == (2, round_)
        if way == "parked":
            lock = MutexLock(JOB, "x")
            assert await lock.acquire(redis)
            assert not (await start(second, delivery, [MutexLock(JOB, "x")]))[0]
            await lock.release(redis)
        elif way == "handed back":
            assert await second.settle([requeue(delivery)]) == [ACCEPTED]
        else:  # its custom lock was refused, or its message is of a later version
            assert await second.settle([Settlement(delivery, retry=defer(delivery, "t", 0))]) == [ACCEPTED]
            await second.promote()
        await worker("1")


@pytest.mark.leaves_keys("diracx:tasks:*")
@pytest.mark.parametrize("times", [1, 2])
async def test_a_requeued_task_is_known_to_be_redelivered_even_if_its_first_worker_survived(
    worker: Worker, redis: Redis, times: int
) -> None:
    first, second = await worker("1"), await worker("2")
    await submit(first, "t")
    [started], _ = await first.fetch(1)
    await died(redis, first, second)
    [delivery], *_ = await second.reclaim(1)
    assert await first.settle([Settlement(started)]) == [TAKEN_OVER]  # so it is alive
    for _ in range(times):
        assert await second.settle([requeue(delivery)]) == [ACCEPTED]
        [delivery], _ = await second.fetch(1)
        assert (delivery.redelivered, delivery.redelivery_count) == (True, 0)
    assert await second.settle([defer_to_newer_worker(delivery, ValueError("a newer version"))]) == [ACCEPTED]
    await redis.zadd(keys.DELAYED, {"t": 1})  # due
    await second.promote()
    [delivery], _ = await second.fetch(1)
    assert delivery.redelivered
    assert await second.settle([Settlement(delivery)]) == [ACCEPTED]


@pytest.mark.leaves_keys("diracx:tasks:*")
@pytest.mark.parametrize("asks", ["for messages", "for locks", "what the dead have left"])
async def test_P5_a_worker_that_fetches_after_a_pause_is_alive_again(
    worker: Worker, redis: Redis, asks: str
) -> None:
    first, second = await worker("1"), await worker("2")
    await submit(first, "t")
    if asks == "for locks":
        [delivery], _ = await first.fetch(1)
    await dies(redis, first)
    match asks:
        case "for messages":
            [delivery], _ = await first.fetch(1, lease_seconds=30)
        case "for locks":
            await first.start([], lease_seconds=30)
        case _:
            assert (await first.reclaim(1, lease_seconds=30))[0] == []
            [delivery], _ = await first.fetch(1)
    assert (await second.reclaim(1))[0] == [], "it was taken from a worker that lives"
    assert await first.settle([requeue(delivery)]) == [ACCEPTED]


async def test_P24_settling_an_old_delivery_keeps_a_newer_lease_of_the_same_entry() -> None:
    old = Delivery(stream=QUEUE, entry="1-1", deliveries=1, data=b"", raw=b"")
    new = replace(old, deliveries=3)  # it was taken over from us, and then by us
    keeper = LeaseKeeper("redis://localhost", "a", 30, asyncio.get_running_loop())
    keeper.add([PendingAck(old)])
    keeper.add([PendingAck(new)])
    keeper.forget([old])
    assert keeper.held() == [(QUEUE, "1-1")]
    keeper.forget([new])
    assert keeper.held() == []


@pytest.mark.leaves_keys("diracx:tasks:*")
async def test_after_a_lost_lease_nothing_is_settled_before_the_worker_is_notified(
    worker: Worker, redis_url: str, redis: Redis
) -> None:
    """A delivery that came since would be settled, and then noted as held by a renewal that began before."""
    mine = await worker("mine")
    await submit(mine, "new")
    [delivery], _ = await mine.fetch(1)
    async with LeaseKeeper(redis_url, "mine", 600, asyncio.get_running_loop()) as keeper:
        keeper.add([PendingAck(delivery)])
        assert await mine.settle([Settlement(delivery)], "a life that is over") == [DATA_LOST]
        keeper.dataset_id = "a life that is over"
        await keeper.renew()
        assert await mine.settle([Settlement(delivery)], keeper.dataset_id) == [ACCEPTED]
    assert not await redis.exists(f"{keys.HELD_PREFIX}mine")


@pytest.mark.leaves_keys("diracx:tasks:*")
async def test_an_unresponsive_worker_that_has_left_is_not_registered_again(
    worker: Worker, redis_url: str, redis: Redis
) -> None:
    mine = await worker("mine")
    async with LeaseKeeper(redis_url, "mine", 600, asyncio.get_running_loop()) as keeper:
        assert await redis.zscore(keys.ALIVE, "mine") is not None
        keeper.stop_renewing()
        assert await mine.leave()
        await keeper.renew()
    assert await redis.zscore(keys.ALIVE, "mine") is None


@pytest.mark.leaves_keys("diracx:tasks:*", "lock:*")
async def test_P6_a_repeated_start_keeps_the_locks_of_the_first_one(worker: Worker, redis: Redis) -> None:
    broker = await worker("a")
    await submit(broker, "t")
    [delivery], _ = await broker.fetch(1)
    locks = [SharedRWLock(JOB, "x"), MutexLock(JOB, "y")]
    assert (await start(broker, delivery, locks))[0]
    await redis.set(f"{keys.RESERVATION_PREFIX}medium:{locks[1].redis_key}", f"{2**45} 1 0 {QUEUE} 1-1 other")
    assert (await start(broker, delivery, locks))[0]


@pytest.mark.leaves_keys("diracx:tasks:*", "lock:*")
async def test_P6_a_repeated_start_that_is_refused_keeps_no_lock(worker: Worker, redis: Redis) -> None:
    broker = await worker("a")
    await submit(broker, "t")
    [delivery], _ = await broker.fetch(1)
    locks = [SharedRWLock(JOB, "x"), MutexLock(JOB, "y"), SharedRWLock(JOB, "z")]
    assert (await start(broker, delivery, locks))[0]
    # Its reply is lost, and it takes so long to ask again that another owner has the lock in the middle.
    await redis.delete(locks[1].redis_key)
    assert await MutexLock(JOB, "y").acquire(redis)
    assert not (await start(broker, delivery, locks))[0]
    for free in (ExclusiveRWLock(JOB, "x"), ExclusiveRWLock(JOB, "z")):
        assert await free.acquire(redis), "no reader runs"
    assert not await redis.exists(f"{keys.HELD_PREFIX}a")


@pytest.mark.leaves_keys("diracx:tasks:*", "lock:*")
async def test_P6_a_leaving_worker_returns_deliveries_whose_reply_was_lost(worker: Worker, redis: Redis) -> None:
    broker = await worker("a")
    await submit(broker, "reads", "writes")
    reads, writes = (await broker.fetch(2))[0]
    assert (await start(broker, reads, [SharedRWLock(JOB, "x")]))[0]
    assert not (await start(broker, writes, [ExclusiveRWLock(JOB, "x")]))[0]
    assert await broker.settle([requeue(reads)]) == [ACCEPTED]  # as one that was not begun
    other = await worker("b")
    assert len((await other.fetch(2))[0]) == 1
    assert await broker.leave()
    [granted], _ = await other.fetch(2)
    assert granted.data == writes.data
    assert not await redis.exists(f"{keys.HELD_PREFIX}a")


@pytest.mark.leaves_keys("diracx:tasks:*")  # it does not stop
async def test_one_command_finds_all_deliveries_of_a_batch_submitted_in_one_ms(
    worker: Worker, redis: Redis
) -> None:
    broker = await worker("busy")
    for number in range(5, 15):  # the sequence numbers get another digit
        await redis.xadd(QUEUE, {"data": b"any"}, id=f"1764500000000-{number}")
    deliveries, _ = await broker.fetch(10)
    assert len(deliveries) == 10
    await redis.config_resetstat()
    assert await broker.settle([Settlement(delivery) for delivery in deliveries]) == [ACCEPTED] * 10
    assert (await redis.info("commandstats"))["cmdstat_xpending"]["calls"] == 1
