"""States with one very large worker, task or message, for `size_states.py`."""

from __future__ import annotations

import asyncio
import os
from datetime import UTC, datetime, timedelta

from diracx.tasks.plumbing import MutexLock
from diracx.tasks.plumbing.broker import inspection, keys, scripts
from diracx.tasks.plumbing.broker.models import Delivery, Settlement, Submission, TaskMessage
from diracx.tasks.plumbing.broker.redis_streams import PROMOTE_BATCH
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import MAX_LOCKS
from diracx.tasks.plumbing.worker.keeper import LeaseKeeper, PendingAck
from redis.asyncio import Redis

from .size_states import CALLS, QUEUE, Slots, State, World, message, queue, start

_MESSAGE_BYTES = 1_000_000


async def _taken(world: World) -> list[Delivery]:
    deliveries: list[Delivery] = []
    while found := (await world.worker.fetch(100, lease_seconds=600))[0]:
        deliveries += found
    return deliveries


async def _locks_of_one_worker(world: World) -> None:
    """Each task has the maximum number of locks."""
    locks = [MutexLock(JOB, number).spec() for number in range(world.items)]
    await queue(world, -(-world.items // MAX_LOCKS))
    for number, delivery in enumerate(await _taken(world)):
        some = locks[number * MAX_LOCKS : (number + 1) * MAX_LOCKS]
        await start(world, [delivery], locks=some)
        world.kept.append(PendingAck(delivery, some))


async def _use_locks_of_one_worker(world: World) -> None:
    await _renew(world)
    known = [lock for hold in world.kept for lock in hold.locks]
    held = [(each.delivery.stream, each.delivery.entry) for each in world.kept]
    await world.worker.fetch_unacknowledged(held, known[::2])
    await world.worker.leave()


async def _renew(world: World) -> None:
    keeper = LeaseKeeper(world.url, world.worker.consumer_name, 600, asyncio.get_running_loop())
    keeper.add(world.kept)
    await keeper.renew()
    await keeper.renew()


async def _slots_of_one_worker(world: World) -> None:
    await queue(world, world.items)
    world.kept.extend(PendingAck(delivery) for delivery in await _taken(world))


async def _use_slots_of_one_worker(world: World) -> None:
    await _renew(world)
    held = [each.delivery for each in world.kept]
    await world.worker.fetch_unacknowledged([(each.stream, each.entry) for each in held])
    await world.worker.fetch_unacknowledged([])
    async with Redis.from_url(world.url) as redis:
        await queue(world, 1)
        await redis.xreadgroup(keys.GROUP, "dead", {QUEUE: ">"})
        await redis.zadd(keys.ALIVE, {"dead": 1})
    await world.worker.reclaim(50, lease_seconds=600)
    for first in range(0, len(held), 100):
        await world.worker.settle([Settlement(delivery) for delivery in held[first : first + 100]])


async def _locks_of_one_task(world: World) -> None:
    await queue(world, CALLS)


async def _use_locks_of_one_task(world: World) -> None:
    """The kind that takes longest."""
    for delivery in await _taken(world):
        locks = [Slots(JOB, number).spec() for number in range(min(world.items, MAX_LOCKS))]
        await start(world, [delivery], locks=locks)
        await world.worker.settle([Settlement(delivery, locks=locks)])


async def _lines_before_one_task(world: World) -> None:
    """Each of the locks of one task is free, but for the last, and has a line behind that task."""
    await queue(world, CALLS + 2 + world.items)
    world.kept.extend((await world.worker.fetch(CALLS, lease_seconds=600))[0])
    locks = [MutexLock(JOB, number) for number in range(MAX_LOCKS)]
    for some in (locks[:-1], locks[-1:]):
        await start(world, (await world.worker.fetch(1))[0], locks=[lock.spec() for lock in some])
    for number, delivery in enumerate(await _taken(world)):
        await start(world, [delivery], locks=[MutexLock(JOB, number % (MAX_LOCKS - 1)).spec()])
    await world.redis.unlink(*[lock.redis_key for lock in locks[:-1]])


async def _use_lines_before_one_task(world: World) -> None:
    """The last lock refuses the task; the others are granted to their waiting tasks."""
    for delivery in world.kept:
        await start(world, [delivery], locks=[MutexLock(JOB, number).spec() for number in range(MAX_LOCKS)])


async def _large_messages(world: World) -> None:
    """Half of them queued, half of them delayed and all due."""
    for number in range(world.items):
        large = TaskMessage(
            task_id=message(number).task_id, task_name="bench:NoOp", task_args=[os.urandom(_MESSAGE_BYTES)]
        )
        due = None if number % 2 else datetime.now(UTC) - timedelta(seconds=1)
        await world.worker.submit([Submission(large, QUEUE, due)])


async def _use_large_messages(world: World) -> None:
    await inspection.delayed_heads(
        world.redis, [message(number).task_id for number in range(0, world.items, 2)], 100
    )
    for _ in range(CALLS):
        await scripts.promote(world.redis, PROMOTE_BATCH)
    await inspection.stream_heads(world.redis, [(QUEUE, "-", "+", 100)], 100)
    for _ in range(CALLS):
        deliveries, _ = await world.worker.fetch(2, lease_seconds=600)
        await world.worker.settle([Settlement(delivery) for delivery in deliveries])
    await world.worker.cancel([message(number).task_id for number in range(world.items)])


async def _cancelled(world: World) -> None:
    """One in twenty runs, and as many listen."""
    await queue(world, world.items)
    redis: Redis = Redis.from_url(world.url, max_connections=world.items)
    world.kept.append(redis)
    for _ in range(world.items // 20):
        await world.worker.fetch(1, lease_seconds=600)
        listener = redis.pubsub()
        await listener.subscribe(keys.CANCELLED, f"{keys.CANCELLED_CHANNEL_PREFIX}{id(listener)}")
        world.kept.append(listener)


async def _use_cancelled(world: World) -> None:
    await world.worker.cancel([message(number).task_id for number in range(world.items)])


HELD_STATES = [
    State("locks that one worker holds", 20_000, _locks_of_one_worker, _use_locks_of_one_worker),
    State("tasks that one worker runs", 1_000, _slots_of_one_worker, _use_slots_of_one_worker),
    State("locks of one task", MAX_LOCKS, _locks_of_one_task, _use_locks_of_one_task),
    State("lines for the locks of one task", 2_000, _lines_before_one_task, _use_lines_before_one_task),
    State("messages of 1 MB", 200, _large_messages, _use_large_messages),
    State("tasks cancelled together, 1,000 listeners", 20_000, _cancelled, _use_cancelled),
]
