"""A task that waits for several locks keeps one of them for a while, to prevent starvation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from diracx.tasks import operations
from diracx.tasks.plumbing import (
    ConcurrencyLimiter,
    ExclusiveRWLock,
    MutexLock,
)
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.plumbing.broker.models import Settlement
from diracx.tasks.plumbing.broker.replies import ACCEPTED
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.plumbing.worker.settlement import requeue
from redis.asyncio import Redis
from support.lines import (
    BATCH,
    LONG_AGO_MS,
    Slots,
    Worker,
    all_step,
    grant_key,
    line_key,
    line_of,
    mutex,
    name_of,
    named,
    quota,
    waits_since,
)

pytestmark = pytest.mark.leaves_keys("diracx:tasks:*", "lock:*", "limiter:*")


async def test_a_line_is_kept_while_a_task_waits_in_it(worker: Worker, redis: Redis) -> None:
    assert await quota().acquire(redis)
    await worker.park(3, quota)
    await worker.submit("urgent", priority="realtime")
    assert await worker.step(lambda: [quota()]) == 0
    assert await line_of(redis, quota()) == ["urgent", "t000000", "t000001", "t000002"]
    assert await redis.ttl(line_key(quota())) == -1


async def test_a_requeued_task_keeps_its_grant(worker: Worker, redis: Redis) -> None:
    holder = mutex()
    assert await holder.acquire(redis)
    first, second = await worker.park(2, mutex)
    await holder.release(redis)
    [delivery], _ = await worker.broker.fetch(BATCH)
    assert await worker.broker.settle([requeue(delivery)]) == [ACCEPTED]
    [again], _ = await worker.broker.fetch(BATCH)
    assert (name_of(again), again.granted) == (first, mutex().redis_key.encode())
    assert await worker.broker.settle([Settlement(again)]) == [ACCEPTED]
    assert await worker.granted() == [second]


class ThreeSlots(ConcurrencyLimiter):
    limit = 3


@pytest.mark.parametrize("kind", [MutexLock, ExclusiveRWLock, Slots, ThreeSlots])
@pytest.mark.parametrize("order", ["ab", "ba", "abc", "cab"])
async def test_a_task_of_several_locks_is_not_starved_by_tasks_of_one_of_them(
    worker: Worker, order: str, kind: type[MutexLock | ExclusiveRWLock | ConcurrencyLimiter]
) -> None:
    """Locks are never free at the same time, as each goes on to the next task at once."""
    names = sorted(order)
    needs: dict[str, Callable[[], Sequence[BaseLock]]] = {
        name: lambda name=name: [named(name, kind)]  # type: ignore[misc]
        for name in names
    }
    needs["all"] = lambda: [named(name, kind) for name in order]
    first = getattr(kind, "limit", 1)  # so many of each have it at a time
    await worker.submit(*[f"{name}-{number}" for name in names for number in range(first)])
    await all_step(worker, needs)
    await waits_since(worker, "all-0", LONG_AGO_MS, needs["all"])
    for number in range(first, 20):
        await worker.submit(*[f"{name}-{number}" for name in names])
        await all_step(worker, needs)
        for name in names:
            if ended := next((each for each in worker.running if each.startswith(f"{name}-")), None):
                await worker.end(ended)
                await all_step(worker, needs)
        if "all-0" in worker.began:
            break
    passed = worker.began.index("all-0") - first * len(names)
    assert passed <= 2 * len(names), "once for each lock before it has the first grant, and on its way to the last"
    while worker.running:
        await worker.end(next(iter(worker.running)))
        await all_step(worker, needs)
    assert not await worker.redis.exists(keys.DELAYED, keys.LINES)
    assert not await worker.redis.keys(keys.RESERVATION_PREFIX + "*")


@dataclass
class Kept:
    """`both` waits for `b`, which `b-0` has, and has kept its grant of `a`; `a-1` waits for that."""

    worker: Worker
    needs: dict[str, Callable[[], Sequence[BaseLock]]]

    async def is_next_at(self, lock: str) -> list[str]:
        await self.worker.look(named(lock))
        await all_step(self.worker, self.needs)
        return self.worker.began[2:]


async def kept(worker: Worker, since_ms: int = LONG_AGO_MS) -> Kept:
    needs: dict[str, Callable[[], Sequence[BaseLock]]] = {
        "a": lambda: [named("a")],
        "b": lambda: [named("b")],
        "both": lambda: [named("a"), named("b")],
    }
    await worker.submit("a-0", "b-0")
    await all_step(worker, needs)
    await waits_since(worker, "both-0", since_ms, needs["both"])
    await worker.submit("a-1")
    await all_step(worker, needs)
    await worker.end("a-0")
    await all_step(worker, needs)
    return Kept(worker, needs)


async def test_a_grant_is_kept_for_a_tenth_of_the_time_that_its_task_has_waited(
    worker: Worker, redis: Redis
) -> None:
    scene = await kept(worker)
    seconds, _ = await redis.time()
    ends = int((await redis.get(grant_key(named("a")))).partition(b" ")[0])  # type: ignore[union-attr]
    assert LONG_AGO_MS / 10 - 5_000 < ends - int(seconds) * 1000 < LONG_AGO_MS / 10 + 5_000
    assert await scene.is_next_at("a") == []
    due = await redis.zscore(keys.LINES, named("a").redis_key)
    assert due is not None
    assert due < int(seconds) * 1000 + 10_000, "it is noticed within seconds that it waits no more"
    await worker.grant_expires(named("a"))
    assert await scene.is_next_at("a") == ["a-1"]


async def test_a_task_that_has_waited_for_seconds_only_keeps_no_grant(worker: Worker) -> None:
    await kept(worker, since_ms=5_000)
    assert worker.began[2:] == ["a-1"]


async def test_a_kept_grant_ends_when_its_task_is_cancelled(worker: Worker, redis: Redis) -> None:
    scene = await kept(worker)
    await worker.broker.cancel(["both-0"])
    assert await scene.is_next_at("a") == ["a-1"]


async def test_a_kept_grant_ends_when_the_lock_that_its_task_waits_for_is_not_taken(worker: Worker) -> None:
    scene = await kept(worker)
    await worker.end("b-0")
    [delivery], _ = await worker.broker.fetch(BATCH)
    assert name_of(delivery) == "both-0"
    assert await worker.broker.settle([Settlement(delivery)]) == [ACCEPTED]
    assert await scene.is_next_at("a") == ["a-1"]


async def test_a_task_ahead_in_line_gets_the_lock_that_is_kept_for_one_behind_it(worker: Worker) -> None:
    scene = await kept(worker)
    await worker.submit("a-urgent", priority="realtime")
    await all_step(worker, scene.needs)
    assert worker.began[2:] == ["a-urgent"]
    await worker.end("b-0")
    await all_step(worker, scene.needs)
    await worker.end("a-urgent")
    await all_step(worker, scene.needs)
    assert worker.began[2:] == ["a-urgent", "both-0"]


async def test_two_tasks_of_the_same_locks_never_keep_them_from_each_other(worker: Worker) -> None:
    scene = await kept(worker)
    scene.needs["reversed"] = lambda: [named("b"), named("a")]
    await waits_since(worker, "reversed-0", LONG_AGO_MS - 10_000, scene.needs["reversed"])
    await waits_since(worker, "reversed-1", LONG_AGO_MS + 10_000, scene.needs["reversed"])
    await worker.end("b-0")
    await all_step(worker, scene.needs)
    for name in ["reversed-1", "both-0", "a-1", "reversed-0"]:
        assert name == worker.began[-1]
        await worker.end(name)
        await all_step(worker, scene.needs)


async def test_a_task_of_several_limiters_keeps_one_slot_and_others_have_the_rest(
    worker: Worker, redis: Redis
) -> None:
    slots = named("a", ThreeSlots)
    needs: dict[str, Callable[[], Sequence[BaseLock]]] = {
        "a": lambda: [named("a", ThreeSlots)],
        "b": lambda: [named("b")],
        "both": lambda: [named("a", ThreeSlots), named("b")],
    }
    await worker.submit("a-0", "a-1", "a-2", "b-0")
    await all_step(worker, needs)
    await waits_since(worker, "both-0", LONG_AGO_MS, needs["both"])
    await worker.submit("a-3", "a-4")
    await all_step(worker, needs)
    for ended in ("a-0", "a-1"):
        await worker.end(ended)
        await all_step(worker, needs)
    assert worker.began[4:] == ["a-3"], "of two slots the task keeps one"
    assert (await redis.exists(grant_key(slots))) == 0, "and no grant, which would keep others from the rest"
    holders = await operations.lock(redis, slots.redis_key)
    assert "kept:both-0" in str(holders), "an operator sees for which task"
    await worker.end("b-0")
    await all_step(worker, needs)
    assert worker.began[5:] == ["both-0"]
    await worker.end("a-2")
    await all_step(worker, needs)
    assert worker.began[6:] == ["a-4"], "the slot that it kept is the one that it has"
