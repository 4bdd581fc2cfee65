"""Arbitrary bytes under all keys: messages are settled, processes survive, valid tasks run."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import msgpack
import pytest
from diracx.tasks import operations as monitor
from diracx.tasks.operations.dead_letters import dead_letter_record
from diracx.tasks.plumbing import BaseTask, MutexLock, SendTaskError, schedule_many
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.plumbing.broker.labels import LABEL_GROUP
from diracx.tasks.plumbing.broker.models import TaskMessage
from diracx.tasks.plumbing.config.reader import ConfigReader
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.testing import TaskSystem
from diracx.tasks.web.auth.backends import Principal, Role, TokenBackend
from diracx.tasks.web.context import AppContext
from diracx.tasks.web.dashboard import DashboardApp
from diracx.tasks.web.dashboard.pages import PAGES
from redis.asyncio import Redis
from support.dashboard_world import WRITER
from support.waiting import until

STREAMS = ["diracx:tasks:normal:medium", "diracx:tasks:realtime:medium", "diracx:tasks:normal:medium:handover"]
ADDRESSES = [page.path for page in PAGES if "{" not in page.path and page.path != "/locks/one"]
NAMES = ["test:Echo", "test:Locked", "test:Unknown", "", "x" * 5_000, "\0\x1b[2J<b>", "é"]


@dataclass
class Echo(BaseTask):
    value: Any = None

    async def execute(self) -> Any:
        return None


@dataclass
class Locked(BaseTask):
    value: Any = None

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(JOB, f"{self.value!r:.40}")]

    async def execute(self) -> Any:
        return None


TASKS = [Echo, Locked]


class Bytes:
    """Generates malformed bytes from a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self._number = 0

    def _id(self) -> str:
        self._number += 1
        return f"{self._number:032x}"

    def value(self, depth: int = 0) -> Any:
        rng = self.rng
        kinds: list[Callable[[], Any]] = [
            lambda: rng.choice(
                [None, True, 0, -1, 2**63 - 1, 1.5, float("nan"), float("inf"), "", "text", b"\xff"]
            ),
            lambda: rng.randbytes(rng.randrange(40)).decode("utf-8", "surrogateescape"),
            lambda: "long " * 3_000,
            lambda: msgpack.ExtType(rng.randrange(127), rng.randbytes(rng.randrange(12))),
            lambda: msgpack.ExtType(1, b"\x7f" * 3_000),  # a number of more than 4,300 digits
            lambda: msgpack.ExtType(6, b"1E+999999"),
        ]
        if depth < 4:
            kinds += [
                lambda: [self.value(depth + 1) for _ in range(rng.randrange(4))],
                lambda: {self.key(): self.value(depth + 1) for _ in range(rng.randrange(4))},
                lambda: msgpack.ExtType(rng.randrange(8, 11), self.pack([self.value(depth + 1)])),
            ]
        return rng.choice(kinds)()

    def key(self) -> Any:
        return self.rng.choice(["a", "vo", "value", 1, b"b", None, 2.5, "\udc80", "k" * 300])

    def pack(self, value: Any) -> bytes:
        packed: bytes = msgpack.packb(value, unicode_errors="surrogatepass")
        return packed

    def deep(self) -> bytes:
        data = b"\xc0"
        around: list[Callable[[bytes], bytes]] = [
            lambda inner: b"\x91" + inner,
            lambda inner: b"\x81\xa1a" + inner,
            lambda inner: msgpack.packb(msgpack.ExtType(10, b"\x91" + inner)),
        ]
        for _ in range(self.rng.choice([40, 195, 1_000, 2_000])):
            data = self.rng.choice(around)(data)
        return b"\x83\xa7task_id\xa1d\xa9task_name\xa9test:Echo\xa9task_args\x91" + data

    def fields(self) -> dict[str, Any]:
        """Fields of a message with one defect."""
        rng = self.rng
        message: dict[str, Any] = {"task_id": self._id(), "task_name": rng.choice(NAMES[:3])}
        label = rng.choice(
            ["group_id", "group_results", "child_results", "secret", "schedule", "schedule_due_ms", "attempts",
             "_retry_attempt", "result_ttl_seconds", "vo", "mine"]
        )  # fmt: skip
        wrong: list[dict[str, Any]] = [
            {"labels": {label: self.value()}},
            {"labels": {label: self.value(), "result_ttl_seconds": 60}},
            {"task_args": [self.value()]},
            {"task_args": [self.value(), self.value()]},
            {"task_kwargs": {"value": self.value(), "vo": self.value()}},
            {"task_kwargs": {self.key(): self.value()}},
            {"trace_context": {"traceparent": rng.choice(["", "00-zz", "x" * 500])}},
            {"trace_context": self.value()},
            {"task_id": rng.choice(["", "i" * 20_000, "a b\n", "\udc80", 5, None])},
            {"task_name": rng.choice(NAMES)},
            {rng.choice(["further", "labels", "task_args"]): self.value()},
        ]
        return message | rng.choice(wrong)

    def message(self) -> bytes:
        rng = self.rng
        made: list[Callable[[], bytes]] = [
            lambda: rng.randbytes(rng.randrange(60)),
            lambda: self.pack(self.value()),
            lambda: self.pack(self.fields()),
            lambda: self.pack(self.fields()),
            lambda: self.pack(self.fields()),
            lambda: self.pack(self.fields())[: rng.randrange(60)],
            lambda: self._flipped(self.pack(self.fields())),
            self.deep,
        ]
        return rng.choice(made)()

    def _flipped(self, data: bytes) -> bytes:
        flipped = bytearray(data)
        for _ in range(3):
            flipped[self.rng.randrange(len(flipped))] ^= 1 << self.rng.randrange(8)
        return bytes(flipped)

    def entry(self) -> dict[str | bytes, Any]:
        """Fields of a stream entry."""
        rng = self.rng
        odd = [b"", b"-1", b"1e309", b"nan", b"9" * 40, b"0x10", b"\xff\xfe", b"abc", b"7"]
        fields: dict[str | bytes, Any] = {"data": self.message()}
        for name in rng.sample(["since", "deaths", "woken"], rng.randrange(3)):
            fields[name] = rng.choice(odd)
        if rng.random() < 0.1:
            return {rng.randbytes(5): rng.randbytes(5)}
        return fields

    def header(self) -> bytes:
        """Header of a delayed task."""
        good = b"diracx:tasks:normal:medium retry 0"
        return self.rng.choice(
            [good, b"diracx:tasks:normal:medium lock abc x y", b"elsewhere retry 0", b"", b"\xff \xff \xff",
             b"diracx:tasks:delayed:data retry 0", b"diracx:tasks:normal:huge at_time 0", good + b" 99999999999"]
        )  # fmt: skip


async def _put(redis: Redis, made: Bytes, number: int) -> None:
    """Hostile bytes in streams, the delayed set, groups, results and dead letters."""
    rng = made.rng
    for position in range(number):
        await redis.xadd(rng.choice(STREAMS), made.entry())  # type: ignore[arg-type]  # bytes are names, too
        task = f"delayed {position}"
        line_break = rng.choice([b"\n", b"\n", b"\n", b""])
        await redis.hset(keys.DELAYED_DATA, task, made.header() + line_break + made.message())
        await redis.zadd(keys.DELAYED, {task: rng.choice([0.0, 1.5, -1e300, float("-inf")])})
        group = f"g{position}"
        await redis.hset(
            f"{keys.GROUPS_PREFIX}{group}",
            mapping={
                rng.choice(
                    ["total", "ttl_ms", "created", "callback", "callback_stream", "failure_name"]
                ): made.message()
                for _ in range(3)
            }
            | {"ttl_ms": rng.choice([b"abc", b"60000", b"1e400", b"-5"])},
        )
        await redis.sadd(f"{keys.GROUPS_PREFIX}{group}:pending", "child", rng.randbytes(4))
        await redis.hset(f"{keys.GROUPS_PREFIX}{group}:failed", rng.randbytes(3), made.message())
        await redis.zadd(keys.GROUPS, {group: rng.choice([1e13, 5e300, float("inf")])})
        await redis.set(f"{keys.RESULT_PREFIX}r{position}", made.message(), ex=60)
        await redis.xadd(keys.DEAD_LETTERS, rng.choice([{"data": made.message()}, {"x": b"\xff"}]))
        child = TaskMessage(task_id="child", task_name="test:Echo", labels={LABEL_GROUP: group})
        await redis.xadd(STREAMS[0], {"data": child.dumpb()})
        await redis.set(f"{keys.GROUPS_PREFIX}s{position}", "no group")
        child = TaskMessage(
            task_id=f"child {position}", task_name="test:Echo", labels={LABEL_GROUP: f"s{position}"}
        )
        await redis.xadd(STREAMS[0], {"data": child.dumpb()})
    await redis.zadd(keys.GROUPS, {b"\xff\xfe": 1e13, "odd": 1e13})
    await redis.set(f"{keys.GROUPS_PREFIX}odd:pending", "no children")
    await redis.xadd(STREAMS[0], {"data": msgpack.packb({"task_id": "child of no group", "task_name": 7})})
    resumed = STREAMS[2]
    await redis.delete(resumed)
    for entry in ("1-1", "9999999999999-1", "18446744073709551615-18446744073709551615"):
        await redis.xadd(resumed, made.entry(), id=entry)  # type: ignore[arg-type]  # bytes are names, too
    await redis.hset(keys.DELAYED_DATA, "full", f"{resumed} retry 0\nno room there".encode())
    await redis.zadd(keys.DELAYED, {"full": 0.0})
    await redis.rpush(keys.GROUP_OUTBOX, "no group", "g0")
    await redis.rpush(f"{keys.GROUPS_PREFIX}g0:staged", b"no line", b"elsewhere\nx", b"\xff\n\xff")


@asynccontextmanager
async def _dashboard(system: TaskSystem) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Reads all read models of the dashboard."""
    context = AppContext(system.broker, system.registry, ConfigReader(), system.task_db, "test")

    async def this() -> AppContext:
        return context

    backend = TokenBackend({WRITER: Principal("wilma", Role.WRITE, None)}, "ask wilma")
    app = DashboardApp(this, backend, hosts={"localhost"}, extensions=[])
    transport = httpx.ASGITransport(app)

    async def read() -> None:
        redis = system.broker.redis
        groups = await monitor.groups(redis)
        addresses = [*ADDRESSES, *(f"/queues/{queue.name}" for queue in await monitor.queues(redis))]
        addresses += [f"/groups/{group.group_id}" for group in groups[:3]]
        for address in addresses:
            response = await client.get(address)
            expected = {200, 404} if address.startswith("/groups/") else {200}  # a group may end meanwhile
            assert response.status_code in expected, f"{address}: {response.text[:3000]}"
        await monitor.failures(redis)
        await monitor.waiting_dead_letters(redis, limit=1000, registry=system.registry)
        assert system.task_db is not None
        async with system.task_db as db:
            for dead_letter in await db.search(status=None):
                dead_letter_record(dead_letter)

    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8790") as client:
        await client.post("/sign-in", data={"credential": WRITER})
        try:
            yield read
        finally:
            await app.aclose()


async def _ended(redis: Redis) -> bool:
    """True if every message has left the streams and the delayed set."""
    left = [await redis.xlen(stream) for stream in STREAMS]
    return not any(left) and not await redis.zcount(keys.DELAYED, "-inf", "+inf")


@pytest.mark.parametrize("seed", range(4))
async def test_any_bytes_are_settled_and_end_no_process(redis_url: str, redis: Redis, seed: int) -> None:
    made = Bytes(seed)
    settings = {"max_concurrent_tasks": 8, "lease_seconds": 5.0}
    try:
        await _put(redis, made, 40)
        async with (
            TaskSystem(TASKS, redis_url=redis_url, workers=0) as unserved,
            _dashboard(unserved) as read,
        ):
            await read()
        async with (
            TaskSystem(TASKS, redis_url=redis_url, workers=1, settings=settings) as system,
            _dashboard(system) as read,
        ):
            honest = await schedule_many([Echo(number) for number in range(5)])
            for task_id in honest:
                assert not (await system.result(task_id)).is_err
            await system.unless_dead(until(lambda: _ended(redis)))
            await read()
            assert (await system.result(await Locked("after").schedule())).return_value is None
        assert not [key async for key in redis.scan_iter("lock:*")]
    finally:
        await redis.flushall()


#: Keys of ours that another client has made of another type, and whether honest tasks go on meanwhile. None: only
#: what is given to workers that wait already, a third of a lease at most.
IN_THE_WAY = {
    "diracx:tasks:realtime:medium": True,
    "diracx:tasks:normal:medium:handover": True,
    keys.DELAYED: True,
    keys.DELAYED_DATA: True,
    keys.DELAYED_REASONS: True,
    keys.GROUP_OUTBOX: True,
    keys.GROUPS: True,
    keys.DEAD_LETTERS: True,
    keys.CANCELLED: True,
    keys.ANY_CANCELLED: True,
    keys.LEADER: True,
    keys.DATASET_ID: True,
    keys.FENCE: True,
    "diracx:tasks:turn:medium:lock:mutex:job:'in the way'": True,
    "lock:mutex:job:'in the way'": True,
    "diracx:tasks:waiting:medium:lock:mutex:job:'in the way'": True,
    keys.RENEWED: True,
    keys.ALIVE: None,
    keys.LEASES: None,
    "diracx:tasks:normal:medium": False,
}


#: Of these, the right type is a string.
STRINGS = (
    "lock",
    keys.ANY_CANCELLED,
    keys.LEADER,
    keys.DATASET_ID,
    keys.FENCE,
    keys.RENEWED,
    keys.RESERVATION_PREFIX,
)


@pytest.mark.parametrize("key", IN_THE_WAY)
async def test_a_key_of_a_wrong_type_stops_no_process_and_affects_no_other_key(
    redis_url: str, redis: Redis, key: str
) -> None:
    settings = {"lease_seconds": 3.0, "lock_retry_seconds": 0.2}
    try:
        async with TaskSystem(TASKS, redis_url=redis_url, workers=2, settings=settings) as system:
            await system.result(await Echo("before").schedule())
            await redis.delete(key)
            if key.startswith(STRINGS):
                await redis.rpush(key, "in the way")
            else:
                await redis.set(key, "in the way")
            if IN_THE_WAY[key]:
                for _ in range(3):
                    await system.result(await Echo("meanwhile").schedule())
                await Locked("in the way").schedule()
                await system.result(await Locked("elsewhere").schedule())
            elif IN_THE_WAY[key] is False:
                with pytest.raises((SendTaskError, TimeoutError)):
                    await system.result(await Echo("not yet").schedule(), timeout=1.0)
            await redis.delete(key)
            await system.result(await Echo("after").schedule())
            await system.drain()
        assert not [lock async for lock in redis.scan_iter("lock:*")]
    finally:
        await redis.flushall()


@pytest.mark.parametrize("stored", [b"no line", b"", b"\n", b"elsewhere retry 0\nx"])
async def test_an_invalid_delayed_entry_of_the_same_id_does_not_prevent_a_wait(
    redis_url: str, redis: Redis, stored: bytes
) -> None:
    lock = MutexLock(JOB, "'free soon'")
    async with TaskSystem(TASKS, redis_url=redis_url, workers=1, settings={"lock_retry_seconds": 0.2}) as system:
        assert await lock.acquire(redis)
        await redis.hset(keys.DELAYED_DATA, "mine", stored)
        message = TaskMessage(task_id="mine", task_name="test:Locked", task_args=["free soon"])
        await redis.xadd(STREAMS[0], {"data": message.dumpb()})
        await system.unless_dead(until(lambda: redis.zcard(keys.DELAYED), when=lambda found: found != 0))
        await lock.release(redis)
        assert not (await system.result("mine")).is_err
        await redis.delete(keys.DELAYED_DATA)


async def test_a_task_whose_group_is_of_another_type_can_be_cancelled_and_its_waiters_are_notified(
    redis_url: str, redis: Redis
) -> None:
    await redis.rpush(f"{keys.GROUPS_PREFIX}odd", "no group")
    async with TaskSystem(TASKS, redis_url=redis_url, workers=0, scheduler=False) as system:
        message = TaskMessage(task_id="child", task_name="test:Echo", labels={LABEL_GROUP: "odd"})
        await redis.xadd(STREAMS[0], {"data": message.dumpb()})
        assert await system.cancel("child") == "queued"
        error = (await system.result("child")).error
    assert error is not None
    assert error["type"] == "TaskCancelledError"
    await redis.delete(f"{keys.GROUPS_PREFIX}odd")


async def test_a_scheduler_starts_with_any_data_in_its_keys(redis_url: str, redis: Redis) -> None:
    hashes = (keys.LAST_RUNS, keys.OUTCOMES, keys.PROBLEMS, keys.FINGERPRINTS, keys.PAUSED)
    await redis.zadd(keys.NEXT_RUNS, {b"\xff\xfe": 5e15, "late": float("inf"), "early": float("-inf")})
    for key in hashes:
        await redis.hset(key, b"\xff\xfe", b"\xff\xfe")
    async with TaskSystem(TASKS, redis_url=redis_url, workers=1) as system:
        await system.result(await Echo("after").schedule(at_time=datetime.now(UTC) + timedelta(seconds=0.2)))
    await redis.delete(*hashes)
