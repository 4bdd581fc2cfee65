"""States of a server with very large amounts of data, and calls on them: see `size.py`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from typing import Any

from diracx.tasks import operations as monitor
from diracx.tasks.plumbing import ConcurrencyLimiter, MutexLock, PeriodicVoAwareBaseTask, RateLimiter
from diracx.tasks.plumbing.broker import (
    RedisStreamBroker,
    groups,
    inspection,
    keys,
    locking,
    running_configs,
    scripts,
)
from diracx.tasks.plumbing.broker.group_audit import fail_lost_children
from diracx.tasks.plumbing.broker.models import Delivery, Settlement, Submission, TaskMessage
from diracx.tasks.plumbing.broker.redis_streams import PROMOTE_BATCH
from diracx.tasks.plumbing.config import TasksConfig
from diracx.tasks.plumbing.enums import Size
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.plumbing.scheduler import TaskScheduler
from diracx.tasks.plumbing.schedules import CronSchedule
from redis.asyncio import Redis

QUEUE = keys.stream_name_for("normal", "medium")
_LARGE = keys.stream_name_for("normal", "large")
_HOUR_MS = 3_600_000
#: Calls of one kind that are looked at.
CALLS = 20
#: Commands in one pipeline.
PORTION = 1000


class Quota(RateLimiter):
    """More than anybody spends here."""

    limit = 10**9
    window_seconds = 60.0


class Slots(ConcurrencyLimiter):
    """More than anybody takes here."""

    limit = 10**9


class Periodic(PeriodicVoAwareBaseTask):
    """Never due."""

    default_schedule = CronSchedule("0 0 1 1 *")

    async def execute(self) -> None:
        pass


@dataclass(frozen=True)
class World:
    """A server in one state."""

    redis: Redis
    worker: RedisStreamBroker
    """A living worker of medium size."""
    url: str
    items: int
    kept: list[Any] = field(default_factory=list)
    """Objects that live as long as the state."""

    async def pipeline(self, commands: Iterable[Sequence[Any]]) -> None:
        pipe = self.redis.pipeline(transaction=False)
        for command in commands:
            pipe.execute_command(*command)
            if len(pipe) >= PORTION:
                await pipe.execute()
        await pipe.execute()

    async def fill(self, step: str, items: int) -> None:
        """Run a step of Lua on the server for each message: it knows `id`, `data` and `n`."""
        before, after = message(0).dumpb().split(b"0" * 32)
        source = f"""
            for n = tonumber(ARGV[1]), tonumber(ARGV[2]) do
                local id = string.format('%032x', n)
                local data = ARGV[3] .. id .. ARGV[4]
                {step}
            end"""
        for first in range(0, items, 5000):
            last = min(first + 5000, items) - 1
            await self.redis.execute_command("EVAL", source, 0, first, last, before, after)

    async def now_ms(self) -> int:
        seconds, microseconds = await self.redis.time()
        return int(seconds * 1000 + microseconds // 1000)


@dataclass(frozen=True)
class State:
    """State of the server with very much of one thing."""

    name: str
    items: int
    build: Callable[[World], Awaitable[Any]]
    use: Callable[[World], Awaitable[Any]]
    """All operations whose time could depend on the state."""


def message(number: int) -> TaskMessage:
    return TaskMessage(task_id=f"{number:032x}", task_name="bench:NoOp")


async def start(
    world: World,
    deliveries: Sequence[Delivery],
    lock_of: Callable[[int], BaseLock] | None = None,
    locks: Sequence[Any] = (),
) -> list[Any]:
    """Begin deliveries, each behind a lock of its own or behind these; returns their locks."""
    wanted: list[Any] = [
        {
            **{"stream": each.stream, "entry": each.entry, "deliveries": each.deliveries, "since": each.since},
            **{"task": TaskMessage.loadb(each.data or b"").task_id, "rank": 1, "retry_ms": _HOUR_MS},
            **{
                "resumed": each.stream + keys.RESUMED_SUFFIX,
                "locks": [lock_of(number).spec()] if lock_of else locks,
            },
        }
        for number, each in enumerate(deliveries)
    ]
    await world.worker.start(wanted, lease_seconds=600)
    return [each["locks"] for each in wanted]


async def queue(world: World, items: int) -> None:
    await world.fill(f"redis.call('XADD', '{QUEUE}', '*', 'data', data)", items)


async def _delayed(world: World) -> None:
    await world.fill(
        f"redis.call('HSET', '{keys.DELAYED_DATA}', id, '{QUEUE} at_time 0\\n' .. data) "
        f"redis.call('ZADD', '{keys.DELAYED}', n, id)",
        world.items,
    )
    await world.redis.hset(keys.DELAYED_REASONS, "at_time", world.items)


async def _use_delayed(world: World) -> None:
    for _ in range(CALLS):
        await scripts.promote(world.redis, PROMOTE_BATCH)
    later = datetime.now(UTC) + timedelta(days=1)
    await world.worker.submit([Submission(message(world.items + n), QUEUE, later) for n in range(200)])
    await inspection.snapshot(world.redis)
    await world.worker.cancel([message(world.items).task_id])


async def _queued(world: World) -> None:
    await queue(world, world.items)


async def _use_queued(world: World) -> None:
    for _ in range(CALLS):
        deliveries, _ = await world.worker.fetch(100, lease_seconds=600)
        await world.worker.settle([Settlement(delivery) for delivery in deliveries])
    await inspection.snapshot(world.redis)
    await world.worker.cancel([message(world.items).task_id])


async def _parked(world: World) -> None:
    """Behind one mutex, which a task of the worker holds."""
    await queue(world, world.items + 1)
    while deliveries := (await world.worker.fetch(100, lease_seconds=600))[0]:
        await start(world, deliveries, lambda _: MutexLock(JOB, "one"))


async def _use_parked(world: World) -> None:
    key = MutexLock(JOB, "one").redis_key
    await monitor.lock(world.redis, key)
    owner: Any = await world.redis.get(key)
    await locking.release(world.redis, [{"kind": "mutex", "key": key, "owner": owner}])
    for _ in range(CALLS):  # one after another gets it
        deliveries, _ = await world.worker.fetch(100, lease_seconds=600)
        locks = await start(world, deliveries, lambda _: MutexLock(JOB, "one"))
        await world.worker.settle(
            [Settlement(each, locks=lock) for each, lock in zip(deliveries, locks, strict=True)]
        )
    await world.redis.zadd(keys.DELAYED, {message(world.items // 2).task_id: 0})
    await scripts.promote(world.redis, PROMOTE_BATCH)


async def _locks_of_the_dead(world: World) -> None:
    await queue(world, world.items)
    first = 0
    while deliveries := (await world.worker.fetch(100, lease_seconds=600))[0]:
        await start(world, deliveries, lambda number, first=first: MutexLock(JOB, first + number))  # type: ignore[misc]
        await world.worker.settle([Settlement(delivery) for delivery in deliveries])
        first += len(deliveries)
    await world.redis.zadd(keys.ALIVE, {world.worker.consumer_name: 1})


async def _reclaim(world: World, audit: bool = False, calls: int = 1000) -> None:
    """Reclaim like a worker, until the reply has a later time for the next call."""
    async with _worker(world.url) as other:
        for _ in range(calls):
            deliveries, again_seconds, _ = await other.reclaim(100, audit=audit, lease_seconds=600)
            await other.settle([Settlement(delivery) for delivery in deliveries])
            if not deliveries and again_seconds > 0:
                return


async def _locks_of_many(world: World) -> None:
    """A thousand of each worker."""

    def commands() -> Iterable[Sequence[Any]]:
        for number in range(world.items):
            worker, key = f"worker-{number // 1000}", f"lock:mutex:job:{number}:"
            yield ("HSET", keys.HELD_PREFIX + worker, f"owner-{number}:{key}", "mutex ")
            yield ("SET", key, f"owner-{number}", "PX", _HOUR_MS)
            yield ("ZADD", keys.ALIVE, 10**15, worker)

    await world.pipeline(commands())


async def _use_locks_of_many(world: World) -> None:
    await monitor.locks(world.redis)


async def _locks_of_one_call(world: World) -> None:
    await world.pipeline(
        ("SET", f"lock:mutex:job:{number}:", "owner", "PX", _HOUR_MS) for number in range(world.items)
    )


async def _use_locks_of_one_call(world: World) -> None:
    locks: list[Any] = [
        {"kind": "mutex", "key": f"lock:mutex:job:{number}:", "owner": "owner"} for number in range(world.items)
    ]
    assert await locking.release(world.redis, locks) == world.items


async def _groups(world: World) -> None:
    fields = {"total": 1, "callback": b"", "callback_name": "bench:NoOp", "callback_stream": QUEUE}
    for number in range(world.items):
        await world.worker.submit_group(f"group-{number}", [Submission(message(number), QUEUE)], fields, 3600)


async def _use_groups(world: World) -> None:
    assert len(await groups.list_groups(world.redis)) == world.items
    await groups.list_groups(world.redis, 100)
    await groups.group_of(world.redis, b"no such child")
    await groups.fire(world.redis, "group-0")
    await fail_lost_children(world.redis)


async def _children(world: World) -> None:
    callback = {"callback": b"", "callback_name": "bench:NoOp", "callback_stream": QUEUE}
    fields = {"total": world.items, "results": 1, **callback}
    children = [Submission(message(number), QUEUE) for number in range(world.items)]
    await world.worker.submit_group("group", children, fields, 3600)


async def _use_children(world: World) -> None:
    await groups.read_group(world.redis, "group")
    ids = [message(number).task_id.encode() for number in range(200)]
    await scripts.fail_children(world.redis, "group", "Error: no", ids)
    await groups.read_results(world.redis, "group", world.items)
    await fail_lost_children(world.redis)
    await groups.fire(world.redis, "group")


async def _forgotten_groups(world: World) -> None:
    await world.pipeline(("ZADD", keys.GROUPS, 1 + number, f"group-{number}") for number in range(world.items))


async def _use_forgotten_groups(world: World) -> None:
    fields = {"total": 1, "callback": b"", "callback_name": "bench:NoOp", "callback_stream": QUEUE}
    for number in range(CALLS):
        await world.worker.submit_group(f"new-{number}", [Submission(message(number), QUEUE)], fields, 3600)
    await groups.list_groups(world.redis, 100)


async def _schedules(world: World) -> None:
    await _plan(world, world.items)


async def _use_schedules(world: World) -> None:
    await _plan(world, world.items)
    await _plan(world, world.items // 2)
    await _plan(world, 0, off=True)
    await inspection.snapshot(world.redis)


async def _plan(world: World, schedules: int, off: bool = False) -> None:
    """A scheduler that leads until it has planned."""
    config = TasksConfig.model_validate({"common": {"bench:Periodic": {"enabled": not off}}})
    broker, stop = RedisStreamBroker(world.url), asyncio.Event()
    scheduler = TaskScheduler(
        broker, {"bench:Periodic": Periodic}, config=config, vos=[f"vo{number}" for number in range(schedules)]
    )
    running = asyncio.create_task(scheduler.run(stop))
    await scheduler.leads.wait()
    stop.set()
    await running
    await broker.shutdown()


async def _grants(world: World) -> None:
    acquire = scripts.script("acquire")
    await world.pipeline(
        ("EVALSHA", acquire.sha, 0, scripts.pack([Quota(JOB, "one").spec()])) for _ in range(world.items)
    )


async def _old_grants(world: World) -> None:
    """A log of an older release: grants are not merged, and all have left the window."""
    key = Quota(JOB, "one").redis_key
    await world.pipeline(("ZADD", key, 1 + number, f"{number + 1:016}:1:owner") for number in range(world.items))


async def _use_grants(world: World) -> None:
    for _ in range(CALLS):
        assert await Quota(JOB, "one").acquire(world.redis)
    await locking.inspect(world.redis, [{"key": Quota(JOB, "one").redis_key, "kind": "rate"}], 10)


async def _slots(world: World) -> None:
    key = Slots(JOB, "one").redis_key
    await world.pipeline(("ZADD", key, 1 + number, f"owner-{number}") for number in range(world.items))


async def _use_slots(world: World) -> None:
    for _ in range(CALLS):
        slot = Slots(JOB, "one")
        assert await slot.acquire(world.redis)
        await slot.release(world.redis)


async def _marks(world: World) -> None:
    await world.pipeline(
        ("ZADD", keys.CANCELLED, 1 + number, message(number).task_id) for number in range(world.items)
    )


async def _use_marks(world: World) -> None:
    for _ in range(CALLS):
        await world.worker.cancel([message(world.items + number).task_id for number in range(10)])


async def _workers(world: World, ends: int, streams: Sequence[str], leftover: str | None) -> None:
    if leftover:
        await world.fill(f"redis.call('XADD', '{leftover}', '*', 'data', data)", world.items)
    for stream in streams:
        await world.pipeline([("XGROUP", "CREATE", stream, keys.GROUP, "0", "MKSTREAM")])
        await world.pipeline(
            ("XGROUP", "CREATECONSUMER", stream, keys.GROUP, f"worker-{number}") for number in range(world.items)
        )
    if leftover:
        await world.pipeline(
            ("XREADGROUP", "GROUP", keys.GROUP, f"worker-{n}", "COUNT", 1, "STREAMS", leftover, ">")
            for n in range(world.items)
        )
    await world.pipeline(("ZADD", keys.ALIVE, ends, f"worker-{number}") for number in range(world.items))


_MEDIUM_STREAMS = keys.streams_of(Size.MEDIUM)


async def _living(world: World) -> None:
    await _workers(world, await world.now_ms() + _HOUR_MS, _MEDIUM_STREAMS, None)


async def _use_living(world: World) -> None:
    for _ in range(CALLS):
        await _reclaim(world, audit=True, calls=1)
    await monitor.workers(world.redis)


async def _dead(world: World) -> None:
    await _workers(world, 1, _MEDIUM_STREAMS, QUEUE)


async def _dead_of_another_size(world: World) -> None:
    await _workers(world, 1, keys.streams_of(Size.LARGE), _LARGE)


async def _use_dead_of_another_size(world: World) -> None:
    for _ in range(3):
        await _reclaim(world, calls=100)


async def _away(world: World) -> None:
    """The leases of all ended while the server was away."""
    await _workers(world, 1 + await world.now_ms() - 1000, _MEDIUM_STREAMS, None)
    await world.redis.zrem(keys.ALIVE, world.worker.consumer_name)


async def _use_away(world: World) -> None:
    await world.worker.fetch(1, lease_seconds=600)


async def _processes(world: World) -> None:
    said = f"{await world.now_ms()} " + json.dumps({"role": "worker", "source": "file", "digest": "0" * 12})
    await world.pipeline(
        ("HSET", keys.CONFIG_IN_FORCE, f"process-{number}", said) for number in range(world.items)
    )


async def _use_processes(world: World) -> None:
    for number in range(CALLS):
        await running_configs.announce(world.redis, f"process-{number}", "{}", 60_000, True)


STATES_OF_MANY = [
    State("delayed tasks, all due", 1_000_000, _delayed, _use_delayed),
    State("queued tasks", 1_000_000, _queued, _use_queued),
    State("tasks parked on one lock", 100_000, _parked, _use_parked),
    State("locks that workers hold", 100_000, _locks_of_many, _use_locks_of_many),
    State("locks of a dead worker", 10_000, _locks_of_the_dead, _reclaim),
    State("locks released together", 5_000, _locks_of_one_call, _use_locks_of_one_call),
    State("groups", 10_000, _groups, _use_groups),
    State("children of one group", 100_000, _children, _use_children),
    State("expired groups", 100_000, _forgotten_groups, _use_forgotten_groups),
    State("schedules", 10_000, _schedules, _use_schedules),
    State("grants within a rate limiter's window", 100_000, _grants, _use_grants),
    State("grants that have left the window", 100_000, _old_grants, _use_grants),
    State("expired slots of a concurrency limiter", 100_000, _slots, _use_slots),
    State("expired marks of cancelled tasks", 100_000, _marks, _use_marks),
    State("live workers", 1_000, _living, _use_living),
    State("dead workers with a task each", 1_000, _dead, _reclaim),
    State("dead workers of a size without live ones", 1_000, _dead_of_another_size, _use_dead_of_another_size),
    State("workers after an outage of the server", 1_000, _away, _use_away),
    State("processes that announce their configuration", 1_000, _processes, _use_processes),
]


@asynccontextmanager
async def _worker(url: str) -> AsyncIterator[RedisStreamBroker]:
    broker = RedisStreamBroker(url)
    await broker.reclaim(0, lease_seconds=600)  # so it lives
    try:
        yield broker
    finally:
        await broker.shutdown()


@asynccontextmanager
async def built(state: State, url: str, items: int) -> AsyncIterator[tuple[World, float]]:
    """An empty server brought into a state; and the bytes of its memory for each item."""
    async with Redis.from_url(url, socket_timeout=120) as redis, _worker(url) as worker:
        for file in SCRIPTS:  # compiling is no part of a call's time
            await redis.script_load(scripts.script(file).source)
        before: Any = await redis.info("memory")
        world = World(redis, worker, url, items)
        await state.build(world)
        after: Any = await redis.info("memory")
        yield world, (after["used_memory"] - before["used_memory"]) / items
        for kept in world.kept:
            if isinstance(kept, Redis):
                await kept.aclose()


SCRIPTS = [
    file.name.removesuffix(".lua")
    for file in (files("diracx.tasks.plumbing.broker") / "lua").iterdir()
    if file.name.endswith(".lua") and not file.name.startswith("_")
]
