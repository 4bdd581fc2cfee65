"""Workers that process lines of waiting tasks step by step."""

from __future__ import annotations

__all__ = [
    "BATCH",
    "BOUNDED",
    "LONG_AGO_MS",
    "QUEUE",
    "Counted",
    "Quota",
    "Running",
    "Slots",
    "Worker",
    "a_worker",
    "all_step",
    "grant_key",
    "line_key",
    "line_of",
    "mutex",
    "name_of",
    "named",
    "quota",
    "reads",
    "slot",
    "waits_since",
    "writes",
]
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from diracx.tasks.plumbing import (
    ConcurrencyLimiter,
    ExclusiveRWLock,
    MutexLock,
    RateLimiter,
    SharedRWLock,
)
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.broker.models import Delivery, Settlement, Submission, TaskMessage, in_ms
from diracx.tasks.plumbing.broker.replies import ACCEPTED
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock
from redis.asyncio import Redis

from support.start_requests import start_request

QUEUE = "diracx:tasks:normal:medium"


BATCH = 500


#: Commands that one script may send, whatever the size of a line.
BOUNDED = 2_500


class Slots(ConcurrencyLimiter):
    limit = 1
    ttl_ms = 600_000


class Quota(RateLimiter):
    limit = 1
    window_seconds = 600.0


def mutex() -> BaseLock:
    return MutexLock(JOB, "x", ttl_ms=600_000)


def reads() -> BaseLock:
    return SharedRWLock(JOB, "x")


def writes() -> BaseLock:
    return ExclusiveRWLock(JOB, "x", ttl_ms=600_000)


def slot(limit: int = 1) -> BaseLock:
    lock = Slots(JOB, "x")
    lock.limit = limit
    return lock


def quota(limit: int = 1) -> BaseLock:
    lock = Quota(JOB, "x")
    lock.limit = limit
    return lock


@dataclass
class Running:
    delivery: Delivery
    locks: Sequence[Any]


@dataclass
class Worker:
    """A worker as seen by the broker; `step` processes its deliveries."""

    broker: RedisStreamBroker
    redis: Redis
    began: list[str] = field(default_factory=list)
    running: dict[str, Running] = field(default_factory=dict)

    async def submit(self, *names: str, priority: str = "normal") -> None:
        stream = f"diracx:tasks:{priority}:{self.broker.worker_size}"
        await self.broker.submit(
            [Submission(TaskMessage(task_id=name, task_name="test:Task"), stream) for name in names]
        )

    async def start(self, deliveries: Sequence[Delivery], needs: Callable[[], Sequence[BaseLock]]) -> int:
        wanted = [start_request(each, needs(), 600_000) for each in deliveries]
        replies = await self.broker.start(wanted)
        for each, requested, reply in zip(deliveries, wanted, replies, strict=True):
            if reply.granted:
                self.began.append(name_of(each))
                self.running[name_of(each)] = Running(each, requested["locks"])
        return sum(reply.granted for reply in replies)

    async def step(self, needs: Callable[[], Sequence[BaseLock]]) -> int:
        """Fetch available tasks; return the number of started ones."""
        deliveries, _ = await self.broker.fetch(BATCH)
        return await self.start(deliveries, needs)

    async def all_steps(self, needs: Callable[[], Sequence[BaseLock]]) -> None:
        while (deliveries := (await self.broker.fetch(BATCH))[0]) and await self.start(deliveries, needs):
            pass

    async def end(self, name: str) -> None:
        ended = self.running.pop(name)
        assert await self.broker.settle([Settlement(ended.delivery, locks=ended.locks)]) == [ACCEPTED]

    async def park(self, number: int, lock: Callable[[], BaseLock], prefix: str = "t") -> list[str]:
        """So many tasks in line for a lock that another owner holds."""
        names = [f"{prefix}{position:06}" for position in range(number)]
        for at in range(0, number, BATCH):
            await self.submit(*names[at : at + BATCH])
            assert await self.step(lambda: [lock()]) == 0
        return names

    async def granted(self) -> list[str]:
        """Return the tasks that were granted a reservation and have not started yet."""
        return [
            TaskMessage.loadb(fields[b"data"]).task_id
            for _, fields in await self.redis.xrange(QUEUE + ":handover")
        ]

    async def look(self, lock: BaseLock) -> None:
        """The timer of the line ends."""
        assert await self.redis.zadd(keys.LINES, {lock.redis_key: 0}, xx=True, ch=True) == 1
        await self.broker.promote()

    async def grant_expires(self, lock: BaseLock, size: str = "medium") -> None:
        """Let the reservation expire."""
        turn: Any = await self.redis.get(grant_key(lock, size))
        await self.redis.set(grant_key(lock, size), b"0 " + turn.partition(b" ")[2])


def name_of(delivery: Delivery) -> str:
    assert delivery.data is not None
    return TaskMessage.loadb(delivery.data).task_id


async def a_worker(redis: Redis, url: str, name: str, size: str) -> AsyncIterator[Worker]:
    broker = RedisStreamBroker(url, consumer_name=name, worker_size=size)
    await redis.zadd(keys.ALIVE, {name: in_ms(datetime.now(UTC)) + 600_000})
    yield Worker(broker, redis)
    await broker.shutdown()


def line_key(lock: BaseLock, size: str = "medium") -> str:
    return f"{keys.WAITING_PREFIX}{size}:{lock.redis_key}"


def grant_key(lock: BaseLock, size: str = "medium") -> str:
    return f"{keys.RESERVATION_PREFIX}{size}:{lock.redis_key}"


async def line_of(redis: Redis, lock: BaseLock, size: str = "medium") -> list[str]:
    waiting = await redis.zrange(line_key(lock, size), 0, -1)
    return [member.decode().partition(":")[2] for member in waiting]


class Counted:
    """The commands that the server has run within, those in scripts included."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def _sum(self) -> int:
        stats: dict[str, Any] = await self._redis.info("commandstats")
        return sum(each["calls"] for name, each in stats.items() if name not in ("cmdstat_info", "cmdstat_time"))

    async def __aenter__(self) -> Counted:
        self._before = await self._sum()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.commands = await self._sum() - self._before


# --- several locks ------------------------------------------------------------------------------------------

LONG_AGO_MS = 600_000


def named(name: str, kind: type[MutexLock | ExclusiveRWLock | ConcurrencyLimiter] = MutexLock) -> BaseLock:
    return kind(JOB, name, ttl_ms=600_000)


async def waits_since(worker: Worker, name: str, ms_ago: int, needs: Callable[[], Sequence[BaseLock]]) -> None:
    """Acquire the locks of a task submitted so long ago, which is refused."""
    await worker.submit(name)
    [delivery], _ = await worker.broker.fetch(BATCH)
    seconds, _ = await worker.redis.time()
    since = str((int(seconds) * 1000 - ms_ago) * 1000)
    assert await worker.start([replace(delivery, since=since)], needs) == 0


async def all_step(worker: Worker, needs: Mapping[str, Callable[[], Sequence[BaseLock]]]) -> None:
    """Names of all tasks, "{lock}-{number}"."""
    while deliveries := (await worker.broker.fetch(BATCH))[0]:
        for delivery in deliveries:
            await worker.start([delivery], needs[name_of(delivery).partition("-")[0]])
