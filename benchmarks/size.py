"""How long the server is kept by one call, however much there is of something: `make bench-size`.

The server does one thing at a time, so while it is at one call everybody waits. Each state is built twice, at half
its size and whole, on a server of its own; then what touches it is done, and the slowest call is taken from the
server's slow log.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
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
from diracx.tasks.testing import embedded_redis
from redis.asyncio import Redis

from .results import RESULTS, machine, write_section

TARGET_MS = 5.0
_QUEUE = keys.stream_name_for("normal", "medium")
_LARGE = keys.stream_name_for("normal", "large")
_HOUR_MS = 3_600_000
#: Calls of one kind that are looked at.
_CALLS = 20
#: Commands in one pipeline.
_PORTION = 1000


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

    async def pipeline(self, commands: Iterable[Sequence[Any]]) -> None:
        pipe = self.redis.pipeline(transaction=False)
        for command in commands:
            pipe.execute_command(*command)
            if len(pipe) >= _PORTION:
                await pipe.execute()
        await pipe.execute()

    async def fill(self, step: str, items: int) -> None:
        """Run a step of Lua on the server for each message: it knows `id`, `data` and `n`."""
        before, after = _message(0).dumpb().split(b"0" * 32)
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
    """What there may be much of."""

    name: str
    items: int
    build: Callable[[World], Awaitable[Any]]
    use: Callable[[World], Awaitable[Any]]
    """Everything of which the time could depend on the state."""


def _message(number: int) -> TaskMessage:
    return TaskMessage(task_id=f"{number:032x}", task_name="bench:NoOp")


async def _start(world: World, deliveries: Sequence[Delivery], lock_of: Callable[[int], BaseLock]) -> list[Any]:
    """Begin deliveries behind a lock each; returns their locks."""
    wanted = [
        {
            **{"stream": each.stream, "entry": each.entry, "deliveries": each.deliveries, "since": each.since},
            **{"task": TaskMessage.loadb(each.data or b"").task_id, "rank": 1, "retry_ms": _HOUR_MS},
            **{"handover": each.stream + keys.HANDOVER, "locks": [lock_of(number).spec()]},
        }
        for number, each in enumerate(deliveries)
    ]
    await world.worker.start(wanted, lease_seconds=600)
    return [each["locks"] for each in wanted]


async def _queue(world: World, items: int) -> None:
    await world.fill(f"redis.call('XADD', '{_QUEUE}', '*', 'data', data)", items)


async def _delayed(world: World) -> None:
    await world.fill(
        f"redis.call('HSET', '{keys.DELAYED_DATA}', id, '{_QUEUE} at_time 0\\n' .. data) "
        f"redis.call('ZADD', '{keys.DELAYED}', n, id)",
        world.items,
    )
    await world.redis.hset(keys.DELAYED_REASONS, "at_time", world.items)


async def _use_delayed(world: World) -> None:
    for _ in range(_CALLS):
        await scripts.promote(world.redis, PROMOTE_BATCH)
    later = datetime.now(UTC) + timedelta(days=1)
    await world.worker.submit([Submission(_message(world.items + n), _QUEUE, later) for n in range(200)])
    await inspection.snapshot(world.redis)
    await world.worker.cancel([_message(world.items).task_id])


async def _queued(world: World) -> None:
    await _queue(world, world.items)


async def _use_queued(world: World) -> None:
    for _ in range(_CALLS):
        deliveries, _ = await world.worker.fetch(100, lease_seconds=600)
        await world.worker.settle([Settlement(delivery) for delivery in deliveries])
    await inspection.snapshot(world.redis)
    await world.worker.cancel([_message(world.items).task_id])


async def _parked(world: World) -> None:
    """Behind one mutex, which a task of the worker holds."""
    await _queue(world, world.items + 1)
    while deliveries := (await world.worker.fetch(100, lease_seconds=600))[0]:
        await _start(world, deliveries, lambda _: MutexLock(JOB, "one"))


async def _use_parked(world: World) -> None:
    key = MutexLock(JOB, "one").redis_key
    await monitor.lock(world.redis, key)
    await locking.release(world.redis, [{"kind": "mutex", "key": key, "owner": await world.redis.get(key)}])
    for _ in range(_CALLS):  # one after another gets it
        deliveries, _ = await world.worker.fetch(100, lease_seconds=600)
        locks = await _start(world, deliveries, lambda _: MutexLock(JOB, "one"))
        await world.worker.settle(
            [Settlement(each, locks=lock) for each, lock in zip(deliveries, locks, strict=True)]
        )
    await world.redis.zadd(keys.DELAYED, {_message(world.items // 2).task_id: 0})
    await scripts.promote(world.redis, PROMOTE_BATCH)


async def _locks_of_the_dead(world: World) -> None:
    await _queue(world, world.items)
    first = 0
    while deliveries := (await world.worker.fetch(100, lease_seconds=600))[0]:
        await _start(world, deliveries, lambda number, first=first: MutexLock(JOB, first + number))  # type: ignore[misc]
        await world.worker.settle([Settlement(delivery) for delivery in deliveries])
        first += len(deliveries)
    await world.redis.zadd(keys.ALIVE, {world.worker.consumer_name: 1})


async def _reclaim(world: World, audit: bool = False, calls: int = 1000) -> None:
    """As a worker does until it is told to come again later."""
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
    fields = {"total": 1, "callback": b"", "callback_name": "bench:NoOp", "callback_stream": _QUEUE}
    for number in range(world.items):
        await world.worker.submit_group(f"group-{number}", [Submission(_message(number), _QUEUE)], fields, 3600)


async def _use_groups(world: World) -> None:
    assert len(await groups.list_groups(world.redis)) == world.items
    await groups.list_groups(world.redis, 100)
    await groups.group_of(world.redis, b"no such child")
    await groups.fire(world.redis, "group-0")
    await fail_lost_children(world.redis)


async def _children(world: World) -> None:
    callback = {"callback": b"", "callback_name": "bench:NoOp", "callback_stream": _QUEUE}
    fields = {"total": world.items, "results": 1, **callback}
    children = [Submission(_message(number), _QUEUE) for number in range(world.items)]
    await world.worker.submit_group("group", children, fields, 3600)


async def _use_children(world: World) -> None:
    await groups.read_group(world.redis, "group")
    ids = [_message(number).task_id.encode() for number in range(200)]
    await scripts.fail_children(world.redis, "group", "Error: no", ids)
    await groups.read_results(world.redis, "group", world.items)
    await fail_lost_children(world.redis)
    await groups.fire(world.redis, "group")


async def _forgotten_groups(world: World) -> None:
    await world.pipeline(("ZADD", keys.GROUPS, 1 + number, f"group-{number}") for number in range(world.items))


async def _use_forgotten_groups(world: World) -> None:
    fields = {"total": 1, "callback": b"", "callback_name": "bench:NoOp", "callback_stream": _QUEUE}
    for number in range(_CALLS):
        await world.worker.submit_group(f"new-{number}", [Submission(_message(number), _QUEUE)], fields, 3600)
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
    """As older releases leave them: nothing merged, and all of them have left the window."""
    key = Quota(JOB, "one").redis_key
    await world.pipeline(("ZADD", key, 1 + number, f"{number + 1:016}:1:owner") for number in range(world.items))


async def _use_grants(world: World) -> None:
    for _ in range(_CALLS):
        assert await Quota(JOB, "one").acquire(world.redis)
    await locking.inspect(world.redis, [{"key": Quota(JOB, "one").redis_key, "kind": "rate"}], 10)


async def _slots(world: World) -> None:
    key = Slots(JOB, "one").redis_key
    await world.pipeline(("ZADD", key, 1 + number, f"owner-{number}") for number in range(world.items))


async def _use_slots(world: World) -> None:
    for _ in range(_CALLS):
        slot = Slots(JOB, "one")
        assert await slot.acquire(world.redis)
        await slot.release(world.redis)


async def _marks(world: World) -> None:
    await world.pipeline(
        ("ZADD", keys.CANCELLED, 1 + number, _message(number).task_id) for number in range(world.items)
    )


async def _use_marks(world: World) -> None:
    for _ in range(_CALLS):
        await world.worker.cancel([_message(world.items + number).task_id for number in range(10)])


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
    for _ in range(_CALLS):
        await _reclaim(world, audit=True, calls=1)
    await monitor.workers(world.redis)


async def _dead(world: World) -> None:
    await _workers(world, 1, _MEDIUM_STREAMS, _QUEUE)


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
    for number in range(_CALLS):
        await running_configs.announce(world.redis, f"process-{number}", "{}", 60_000, True)


STATES = [
    State("delayed tasks, all due", 1_000_000, _delayed, _use_delayed),
    State("queued tasks", 1_000_000, _queued, _use_queued),
    State("tasks parked on one lock", 100_000, _parked, _use_parked),
    State("locks that workers hold", 100_000, _locks_of_many, _use_locks_of_many),
    State("locks of a dead worker", 10_000, _locks_of_the_dead, _reclaim),
    State("locks released together", 5_000, _locks_of_one_call, _use_locks_of_one_call),
    State("groups", 10_000, _groups, _use_groups),
    State("children of one group", 100_000, _children, _use_children),
    State("groups that are forgotten", 100_000, _forgotten_groups, _use_forgotten_groups),
    State("schedules", 10_000, _schedules, _use_schedules),
    State("grants within a rate limiter's window", 100_000, _grants, _use_grants),
    State("grants that have left the window", 100_000, _old_grants, _use_grants),
    State("expired slots of a concurrency limiter", 100_000, _slots, _use_slots),
    State("expired marks of cancelled tasks", 100_000, _marks, _use_marks),
    State("living workers", 1_000, _living, _use_living),
    State("dead workers with a task each", 1_000, _dead, _reclaim),
    State("dead workers of a size nobody serves", 1_000, _dead_of_another_size, _use_dead_of_another_size),
    State("workers after the server was away", 1_000, _away, _use_away),
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
    async with Redis.from_url(url) as redis, _worker(url) as worker:
        for file in _SCRIPTS:  # compiling is no part of a call's time
            await redis.script_load(scripts.script(file).source)
        before: Any = await redis.info("memory")
        world = World(redis, worker, url, items)
        await state.build(world)
        after: Any = await redis.info("memory")
        yield world, (after["used_memory"] - before["used_memory"]) / items


_SCRIPTS = [
    file.name.removesuffix(".lua")
    for file in (files("diracx.tasks.plumbing.broker") / "lua").iterdir()
    if file.name.endswith(".lua") and not file.name.startswith("_")
]
_NAMES = {scripts.script(name).sha: f"{name}.lua" for name in _SCRIPTS}


async def slowest_call(state: State, items: int) -> tuple[float, str, float]:
    """The longest that the server was at one call (ms), which that was, and bytes per item."""
    with embedded_redis("--slowlog-max-len", "100000", "--slowlog-log-slower-than", "-1") as url:
        async with built(state, url, items) as (world, bytes_each):
            await world.redis.config_set("slowlog-log-slower-than", 100)
            await world.redis.config_resetstat()
            await state.use(world)
            slow: Any = await world.redis.execute_command("SLOWLOG", "GET", -1)
            stats: Any = await world.redis.info("commandstats")
    calls = [(entry[2] / 1000, _named([part.decode(errors="replace") for part in entry[3]])) for entry in slow]
    if transactions := stats.get("cmdstat_exec"):  # which the slow log knows by their parts only
        calls.append((transactions["usec_per_call"] / 1000, "EXEC, on average"))
    slowest = max(calls, default=(0.1, "all"))
    return *slowest, bytes_each


def _named(command: Sequence[str]) -> str:
    name = command[0].upper()
    return _NAMES[command[1]] if name == "EVALSHA" else name


async def most_work(state: State, items: int, url: str) -> tuple[int, str]:
    """The most that the server did in one call, and in which: commands, and members of what they deal with."""
    lines: list[dict[str, Any]] = []
    async with (
        built(state, url, items) as (world, _),
        Redis.from_url(url) as watching,
        watching.monitor() as commands,
    ):

        async def listen() -> None:
            async for line in commands.listen():
                lines.append(line)
                if line["command"] == "ECHO the end":
                    return

        members = await _members(world.redis)
        listening = asyncio.create_task(listen())
        await state.use(world)
        await world.redis.execute_command("ECHO", "the end")
        await listening
    most, call, work, in_transaction = 0, "", 0, 0
    name = ""
    for line in lines:
        command = line["command"].split(" ")
        work_here = 1 + (members.get(command[1], 0) if _deals_with_all(command) else 0)
        if line["client_type"] == "lua":
            work += work_here
        else:
            name, work = _named(command), work_here
            in_transaction = 0 if name == "MULTI" else in_transaction + work_here
            if name == "EXEC":
                work = in_transaction
        if work > most:
            most, call = work, name
    return most, call


def _deals_with_all(command: Sequence[str]) -> bool:
    """Whether its time depends on how much its key has."""
    name = command[0].upper()
    if name in ("ZRANGE", "LRANGE", "ZREVRANGE"):
        return command[2:4] == ["0", "-1"]
    if name in ("ZRANGEBYSCORE", "ZREMRANGEBYSCORE"):
        return "LIMIT" not in command
    return name in ("DEL", "HGETALL", "HKEYS", "HVALS", "SMEMBERS")


async def _members(redis: Redis) -> dict[str, int]:
    """How much each key has."""
    sizes = {"hash": "HLEN", "set": "SCARD", "zset": "ZCARD", "list": "LLEN", "stream": "XLEN"}
    found = {}
    async for key in redis.scan_iter(count=_PORTION):
        kind = (await redis.execute_command("TYPE", key)).decode()
        found[key.decode()] = await redis.execute_command(sizes[kind], key) if kind in sizes else 1
    return found


@dataclass(frozen=True)
class Found:
    """Of one state."""

    state: str
    items: int
    slowest_ms: float
    call: str
    growth: float
    """The slowest call, over that at half the size."""
    bytes_each: float


async def measure(scale: float, only: str, rounds: int) -> list[Found]:
    found = []
    for state in STATES:
        if not re.search(only, state.name):
            continue
        items = max(20, int(state.items * scale))
        # A shared machine stops the server at times: of some rounds the quietest counts.
        half, *_ = min([await slowest_call(state, items // 2) for _ in range(rounds)])
        slowest_ms, call, bytes_each = min([await slowest_call(state, items) for _ in range(rounds)])
        found.append(Found(state.name, items, slowest_ms, call, slowest_ms / half, bytes_each))
    return found


def report(found: Sequence[Found], scale: float) -> str:
    rows = "\n".join(
        f"| {each.state} | {each.items:,} | {each.slowest_ms:.1f} | {each.call} | {each.growth:.1f} | "
        f"{each.bytes_each:,.0f} |"
        for each in found
    )
    return f"""## One call, however much there is

Measured by `make bench-size` on {datetime.now(UTC):%Y-%m-%d}, at {scale:g} times the full sizes: {machine()}.
While the server is at one call everybody else waits, so none is to take more than {TARGET_MS:g} ms. Growth:
against half as many items. Calls of 0.1 ms and less are not told apart.

| state | items | slowest call, ms | which | growth when doubled | bytes per item |
|---|---|---|---|---|---|
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-size", description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="part of the full sizes (default 1)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the quietest counts (default 3)")
    parser.add_argument("--only", default="", help="states whose name has this regular expression")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table; RESULTS.md stays as it is")
    parser.add_argument("--dry-run", action="store_true", help="print only, leave RESULTS.md as it is")
    arguments = parser.parse_args()
    found = asyncio.run(measure(arguments.scale, arguments.only, arguments.rounds))
    if arguments.json:
        print(json.dumps([asdict(each) for each in found]))
        return
    text = report(found, arguments.scale)
    print(text)
    if not arguments.dry_run and not arguments.only and arguments.scale == 1:
        write_section("make bench-size", text)
        print(f"written to {RESULTS}")
    if missed := [f"{each.state}: {each.slowest_ms:.1f} ms" for each in found if each.slowest_ms > TARGET_MS]:
        parser.exit(1, f"longer than {TARGET_MS:g} ms: {'; '.join(missed)}\n")


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        main()
