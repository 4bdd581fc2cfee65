"""Lines of tasks that wait for a lock: nobody polls, nobody is forgotten, and no step does unbounded work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import pytest
from diracx.tasks import operations
from diracx.tasks.plumbing import (
    BaseTask,
    ConcurrencyLimiter,
    ExclusiveRWLock,
    MutexLock,
    RateLimiter,
    SharedRWLock,
)
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys, scripts
from diracx.tasks.plumbing.broker.models import Delivery, Settlement, Submission, TaskMessage, in_ms
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.plumbing.worker.settlement import hand_back
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis

QUEUE = "diracx:tasks:normal:medium"
BATCH = 500
#: Commands that one script may send, whatever the size of a line.
BOUNDED = 2_500

pytestmark = pytest.mark.leaves_keys("diracx:tasks:*", "lock:*", "limiter:*")


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
    """A worker as the broker sees it; `step` does what a worker does with what it is given."""

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
        wanted = [
            {
                "stream": each.stream,
                "entry": each.entry,
                "deliveries": each.deliveries,
                "task": name_of(each),
                "rank": ["realtime", "normal", "background"].index(each.priority),
                "resumed": each.stream.removesuffix(keys.HANDOVER) + keys.HANDOVER,
                "since": each.since,
                "locks": [lock.spec() for lock in needs()],
                "retry_ms": 600_000,
                "granted": each.granted,
            }
            for each in deliveries
        ]
        replies, _ = await self.broker.start(wanted)
        for each, asked, reply in zip(deliveries, wanted, replies, strict=True):
            if reply[0] == 1:
                self.began.append(name_of(each))
                self.running[name_of(each)] = Running(each, asked["locks"])
        return sum(reply[0] == 1 for reply in replies)

    async def step(self, needs: Callable[[], Sequence[BaseLock]]) -> int:
        """Take what there is; returns how many began."""
        deliveries, _ = await self.broker.fetch(BATCH)
        return await self.start(deliveries, needs)

    async def all_steps(self, needs: Callable[[], Sequence[BaseLock]]) -> None:
        while (deliveries := (await self.broker.fetch(BATCH))[0]) and await self.start(deliveries, needs):
            pass

    async def end(self, name: str) -> None:
        ended = self.running.pop(name)
        assert await self.broker.settle([Settlement(ended.delivery, locks=ended.locks)]) == [True]

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

    async def turn_ends(self, lock: BaseLock, size: str = "medium") -> None:
        """Let the reservation expire."""
        turn: Any = await self.redis.get(turn_key(lock, size))
        await self.redis.set(turn_key(lock, size), b"0 " + turn.partition(b" ")[2])


def name_of(delivery: Delivery) -> str:
    assert delivery.data is not None
    return TaskMessage.loadb(delivery.data).task_id


async def a_worker(redis: Redis, url: str, name: str, size: str) -> AsyncIterator[Worker]:
    broker = RedisStreamBroker(url, consumer_name=name, worker_size=size)
    await redis.zadd(keys.ALIVE, {name: in_ms(datetime.now(UTC)) + 600_000})
    yield Worker(broker, redis)
    await broker.shutdown()


@pytest.fixture
async def worker(redis_url: str, redis: Redis) -> AsyncIterator[Worker]:
    async for worker in a_worker(redis, redis_url, "a", "medium"):
        yield worker


@pytest.fixture
async def small(redis_url: str, redis: Redis) -> AsyncIterator[Worker]:
    """A worker of another size, which does nothing but what a test has it do."""
    async for worker in a_worker(redis, redis_url, "b", "small"):
        yield worker


def line_key(lock: BaseLock, size: str = "medium") -> str:
    return f"{keys.WAITING_PREFIX}{size}:{lock.redis_key}"


def turn_key(lock: BaseLock, size: str = "medium") -> str:
    return f"{keys.TURN_PREFIX}{size}:{lock.redis_key}"


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


# --- who leaves a line --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lock", [mutex, writes, slot, quota])
async def test_who_is_cancelled_is_taken_out_of_its_line(
    worker: Worker, redis: Redis, lock: Callable[[], BaseLock]
) -> None:
    assert await lock().acquire(redis)
    first, second, third = await worker.park(3, lock)
    await worker.broker.cancel([first, second])
    assert await line_of(redis, lock()) == [third]
    await worker.broker.cancel([third])
    assert not await redis.exists(line_key(lock()), keys.LINES, keys.DELAYED)


async def test_readers_begin_when_the_writer_before_them_is_cancelled(worker: Worker, redis: Redis) -> None:
    assert await writes().acquire(redis)
    await worker.submit("writes")
    assert await worker.step(lambda: [writes()]) == 0
    await worker.park(2, reads)
    await redis.delete(reads().redis_key)
    assert await reads().acquire(redis)
    await worker.broker.cancel(["writes"])
    async with asyncio.timeout(5):
        while len(worker.began) < 2:
            await worker.broker.promote()  # at once: the line is due
            await worker.step(lambda: [reads()])


async def test_a_line_is_kept_while_a_task_waits_in_it(worker: Worker, redis: Redis) -> None:
    assert await quota().acquire(redis)
    await worker.park(3, quota)
    await worker.submit("urgent", priority="realtime")
    assert await worker.step(lambda: [quota()]) == 0
    assert await line_of(redis, quota()) == ["urgent", "t000000", "t000001", "t000002"]
    assert await redis.ttl(line_key(quota())) == -1


# --- every end hands on -------------------------------------------------------------------------------------

ENDS: dict[str, Callable[[Delivery], Settlement]] = {
    "rejected": lambda d: Settlement(d, dead={"reason": "unknown_task", "data": b"a dead letter"}),
    "rejected, the dead letter in the database": Settlement,
    "cancelled": lambda d: Settlement(d, result={"key": "diracx:results:t", "value": b"", "ttl_ms": 1000}),
    "a child of a group": lambda d: Settlement(d, group={"id": "g", "child": "t000000", "error": "rejected"}),
    "to be tried later": lambda d: Settlement(
        d, retry={"task": "t000000", "delay_ms": 600_000, "stream": QUEUE, "data": d.data}
    ),
    "with another lock only": lambda d: Settlement(d, locks=[MutexLock(JOB, "other").spec()]),
}


@pytest.mark.parametrize("lock", [mutex, slot, writes])
@pytest.mark.parametrize("end", ENDS)
async def test_who_is_granted_the_turn_and_ends_without_the_lock_hands_it_on(
    worker: Worker, redis: Redis, end: str, lock: Callable[[], BaseLock]
) -> None:
    holder = lock()
    assert await holder.acquire(redis)
    first, second = await worker.park(2, lock)
    await holder.release(redis)
    [delivery], _ = await worker.broker.fetch(BATCH)
    assert (name_of(delivery), await line_of(redis, lock())) == (first, [second])
    assert await worker.broker.settle([ENDS[end](delivery)]) == [True]
    assert await worker.granted() == [second]


async def test_who_hands_a_task_back_keeps_its_turn_with_it(worker: Worker, redis: Redis) -> None:
    holder = mutex()
    assert await holder.acquire(redis)
    first, second = await worker.park(2, mutex)
    await holder.release(redis)
    [delivery], _ = await worker.broker.fetch(BATCH)
    assert await worker.broker.settle([hand_back(delivery)]) == [True]
    [again], _ = await worker.broker.fetch(BATCH)
    assert (name_of(again), again.granted) == (first, mutex().redis_key.encode())
    assert await worker.broker.settle([Settlement(again)]) == [True]
    assert await worker.granted() == [second]


@pytest.mark.parametrize("lock", [mutex, slot, quota])
async def test_a_line_whose_tasks_need_the_lock_no_more_drains_at_once(
    worker: Worker, redis: Redis, lock: Callable[[], BaseLock]
) -> None:
    assert await lock().acquire(redis)
    names = await worker.park(50, lock)
    await redis.delete(lock().redis_key)
    await worker.look(lock())
    await worker.all_steps(list)
    assert worker.began == names


async def test_a_worker_asks_also_for_a_task_that_needs_its_lock_no_more(redis_url: str, redis: Redis) -> None:
    needed, hold = [True], asyncio.Event()
    begun: list[int] = []

    @dataclass
    class Needs(BaseTask):
        number: int

        @property
        def execution_locks(self) -> list[BaseLock]:
            return [mutex()] if needed else []

        async def execute(self) -> None:
            begun.append(self.number)
            await hold.wait()

    holder = mutex()
    assert await holder.acquire(redis)
    async with TaskSystem([Needs], redis_url=redis_url, settings={"lock_retry_seconds": 600.0}) as system:
        for number in range(5):
            await Needs(number).schedule()
        while await redis.zcard(keys.DELAYED) < 5:
            await asyncio.sleep(0.005)
        needed.clear()
        before = await redis.info("commandstats")
        await holder.release(redis)
        async with asyncio.timeout(30):
            while len(begun) < 5:
                await asyncio.sleep(0.005)
        turns_timed_out = (await redis.info("commandstats"))["cmdstat_pttl"]["calls"] - before.get(
            "cmdstat_pttl", {"calls": 0}
        )["calls"]
        assert turns_timed_out < 20, "each waited for the turn of the one before to end"
        hold.set()
        await system.drain()


async def test_a_turn_whose_worker_has_died_goes_to_the_next(worker: Worker, redis: Redis) -> None:
    holder = mutex()
    assert await holder.acquire(redis)
    _, second = await worker.park(2, mutex)
    await holder.release(redis)
    [_], _ = await worker.broker.fetch(BATCH)  # and its worker is killed
    due_ms = await redis.zscore(keys.LINES, mutex().redis_key)
    seconds, us = await redis.time()
    assert due_ms is not None
    assert due_ms - (seconds * 1000 + us / 1000) < 1_100
    await worker.turn_ends(mutex())
    await worker.look(mutex())
    assert [name_of(each) for each in (await worker.broker.fetch(BATCH))[0]] == [second]


# --- those whom no worker takes -----------------------------------------------------------------------------


@pytest.mark.parametrize("lock", [mutex, writes, reads, slot, quota])
@pytest.mark.parametrize("before", [3, 1_000])
async def test_who_can_run_waits_for_one_turn_however_many_stand_before_whom_no_worker_takes(
    worker: Worker, small: Worker, redis: Redis, lock: Callable[[], BaseLock], before: int
) -> None:
    holds = writes if lock is reads else lock
    assert await holds().acquire(redis)
    await small.park(before, lock, "nobody takes ")
    names = await worker.park(5, lock)
    await redis.delete(lock().redis_key)
    await worker.look(lock())
    if lock is reads and before == 3:
        assert await worker.step(lambda: [lock()]) == 5, "they read beside each other"
        return
    assert await worker.step(lambda: [lock()]) == 0, "they are first, and have their turn"
    await small.turn_ends(lock(), "small")
    for name in names:  # from now on no turn is lost
        if name not in worker.began:
            await worker.look(lock())
            await worker.step(lambda: [lock()])
        assert name in worker.began
        if lock is quota:
            await redis.delete(quota().redis_key)
        else:
            await worker.end(name)
    assert worker.began == names
    taken = await redis.xlen("diracx:tasks:normal:small:handover")
    # Of readers one call resumes 50, fewer where messages are larger; else one stands for all of its size.
    assert taken in (range(40, 51) if lock is reads else (1,))


@pytest.mark.parametrize("lock", [mutex, writes, slot])
async def test_a_release_goes_at_once_to_the_first_whom_a_worker_takes(
    worker: Worker, small: Worker, redis: Redis, lock: Callable[[], BaseLock]
) -> None:
    await worker.submit("holder")
    assert await worker.step(lambda: [lock()]) == 1
    await small.park(100, lock, "nobody takes ")
    names = await worker.park(20, lock)
    await worker.end("holder")
    await small.turn_ends(lock(), "small")
    await worker.look(lock())
    for name in names:
        assert await worker.step(lambda: [lock()]) == 1
        await worker.end(name)
    assert worker.began == ["holder", *names]


async def test_a_line_advances_while_grants_of_other_lines_are_not_taken(
    worker: Worker, small: Worker, redis: Redis
) -> None:
    def other(number: int) -> BaseLock:
        return MutexLock(JOB, f"other{number}", ttl_ms=600_000)

    others = [other(number) for number in range(600)]
    for number, held in enumerate(others):
        assert await held.acquire(redis)
        await small.park(1, lambda number=number: other(number), f"other{number} ")  # type: ignore[misc]
    assert await mutex().acquire(redis)
    await small.park(1, mutex, "nobody takes ")
    for held in others:
        await held.release(redis)
    assert await redis.xlen("diracx:tasks:normal:small:handover") == 600
    [second] = await worker.park(1, mutex)
    await redis.delete(mutex().redis_key)
    await worker.look(mutex())
    await small.turn_ends(mutex(), "small")
    await worker.look(mutex())
    assert await worker.step(lambda: [mutex()]) == 1
    assert (worker.began, await line_of(redis, mutex(), "small")) == ([second], [])


async def test_who_was_passed_over_has_its_place_again_as_soon_as_a_worker_takes_it(
    worker: Worker, small: Worker, redis: Redis
) -> None:
    await worker.submit("holder")
    assert await worker.step(lambda: [mutex()]) == 1
    early = await small.park(3, mutex, "small ")
    names = await worker.park(3, mutex)
    await worker.end("holder")
    await small.turn_ends(mutex(), "small")
    await worker.look(mutex())
    assert await worker.step(lambda: [mutex()]) == 1
    assert await small.step(lambda: [mutex()]) == 0, "its turn has ended, and another has the lock"
    assert await line_of(redis, mutex(), "small") == early
    await worker.end(names[0])
    for name in early:
        assert await small.step(lambda: [mutex()]) == 1
        await small.end(name)
    for name in names[1:]:
        assert await worker.step(lambda: [mutex()]) == 1
        await worker.end(name)
    assert (small.began, worker.began) == (early, ["holder", *names])


async def test_who_asks_late_is_not_refused_because_of_those_whom_no_worker_takes(
    worker: Worker, small: Worker, redis: Redis
) -> None:
    assert await mutex().acquire(redis)
    await small.park(3, mutex, "nobody takes ")
    await worker.park(1, mutex)
    await redis.delete(mutex().redis_key)
    for who, size in ((small, "small"), (worker, "medium")):
        await worker.look(mutex())
        await who.turn_ends(mutex(), size)
    assert await worker.step(lambda: [mutex()]) == 1


async def test_more_urgent_tasks_have_a_turn_of_their_own_before_they_are_passed_over(
    worker: Worker, small: Worker, redis: Redis
) -> None:
    assert await mutex().acquire(redis)
    await small.park(2, mutex, "nobody takes ")
    [waits] = await worker.park(1, mutex)
    await redis.delete(mutex().redis_key)
    await worker.look(mutex())
    await small.turn_ends(mutex(), "small")
    assert await mutex().acquire(redis)
    await small.submit("urgent", priority="realtime")
    assert (await small.broker.fetch(1))[0][0].priority == "realtime"
    await small.broker.recover([])
    deliveries = await small.broker.recover([])
    assert await small.start(deliveries, lambda: [mutex()]) == 0
    assert await line_of(redis, mutex(), "small") == ["urgent", "nobody takes 000001"]
    await redis.delete(mutex().redis_key)
    await worker.look(mutex())
    assert await redis.xlen("diracx:tasks:realtime:small:handover") == 1
    await small.turn_ends(mutex(), "small")
    await worker.look(mutex())
    assert await worker.step(lambda: [mutex()]) == 1
    assert worker.began == [waits]


# --- what waiting costs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lock", [mutex, writes, slot, quota])
async def test_a_grant_costs_the_same_for_any_length_of_the_line(
    worker: Worker, redis: Redis, lock: Callable[[], BaseLock]
) -> None:
    costs = []
    for length in (20, 2_000):
        await redis.flushall()
        await worker.submit("holder")
        assert await worker.step(lambda: [lock()]) == 1
        await worker.park(length, lock)
        counted = Counted(redis)
        async with counted:
            for _ in range(10):
                await worker.end(worker.began[-1])
                if lock is quota:
                    await redis.delete(quota().redis_key)
                    await worker.look(quota())
                assert await worker.step(lambda: [lock()]) == 1
        costs.append(counted.commands)
    assert costs[1] <= costs[0] + 5, "a ZADD more or less, where the timer was earlier"
    assert costs[0] < 10 * 100


async def test_a_line_in_which_nothing_moves_costs_nothing(worker: Worker, redis: Redis) -> None:
    assert await mutex().acquire(redis)
    await worker.park(1_000, mutex)
    await redis.zadd(keys.LINES, {mutex().redis_key: 0})
    counted = Counted(redis)
    async with counted:
        for _ in range(10):
            again_ms = await worker.broker.promote()
    assert again_ms is not None
    assert again_ms > 9_000, "looked at again by one timer for all"
    assert counted.commands < 100
    assert await worker.granted() == []


@pytest.mark.parametrize("gone", ["cancelled by others", "readers"])
async def test_a_release_does_bounded_work_and_the_rest_is_carried_on(
    worker: Worker, redis: Redis, gone: str
) -> None:
    holder = writes()
    assert await holder.acquire(redis)
    names = await worker.park(1_000, reads if gone == "readers" else writes)
    if gone != "readers":
        await redis.hdel(keys.DELAYED_DATA, *names[:-1])
        await redis.zrem(keys.DELAYED, *names[:-1])
    counted = Counted(redis)
    async with counted:
        await holder.release(redis)
    assert counted.commands < BOUNDED
    assert len(await worker.granted()) <= 50
    async with asyncio.timeout(60):
        while len(worker.began) < (1_000 if gone == "readers" else 1):
            async with counted:
                await worker.broker.promote()
                await worker.step(lambda: [reads() if gone == "readers" else writes()])
    assert worker.began == (names if gone == "readers" else names[-1:])


async def test_one_call_that_gives_back_many_locks_does_bounded_work(worker: Worker, redis: Redis) -> None:
    locks = [MutexLock(JOB, f"m{number}", ttl_ms=600_000) for number in range(400)]
    await worker.submit(*(f"holds{number}" for number in range(400)))
    given = iter(locks)
    deliveries, _ = await worker.broker.fetch(BATCH)
    for delivery in deliveries:
        assert await worker.start([delivery], lambda: [next(given)]) == 1
    wanted = iter([MutexLock(JOB, f"m{number}", ttl_ms=600_000) for number in range(400)])
    await worker.submit(*(f"waits{number}" for number in range(400)))
    for delivery in (await worker.broker.fetch(BATCH))[0]:
        assert await worker.start([delivery], lambda: [next(wanted)]) == 0
    settlements = [Settlement(each.delivery, locks=each.locks) for each in worker.running.values()]
    assert await scripts.settle(redis, "a", settlements) == [True] * 400
    assert len(await worker.granted()) <= 50
    async with asyncio.timeout(60):
        while len(await worker.granted()) < 400:
            await worker.broker.promote()


async def test_thousands_of_locks_that_a_worker_does_not_know_are_given_back_part_by_part(
    worker: Worker, redis: Redis
) -> None:
    held = keys.HELD_PREFIX + "a"

    async def hold(number: int) -> None:
        locks = [f"lock:mutex:job:{name}" for name in range(number)]
        await redis.mset(dict.fromkeys(locks, "o"))
        await redis.hset(held, mapping={f"o:{lock}": "mutex " for lock in locks})

    await hold(9_000)
    assert await worker.broker.recover([], []) == []
    assert not await redis.exists(held)
    await hold(1_000)
    async with Counted(redis) as leaving:
        assert not await worker.broker.leave(), "others give them back, as those of the dead"
    assert leaving.commands < BOUNDED
    reclaiming = RedisStreamBroker(worker.broker.url, consumer_name="b")
    for _ in range(7):
        await reclaiming.reclaim(1)
    await reclaiming.shutdown()
    assert not await redis.keys("lock:mutex:*")


# --- limits that change, and who goes first -----------------------------------------------------------------


@pytest.mark.parametrize("lock", [slot, quota])
async def test_a_limit_that_is_lifted_lets_the_whole_line_go_and_nobody_overtakes(
    worker: Worker, redis: Redis, lock: Callable[[int], BaseLock]
) -> None:
    assert await lock(1).acquire(redis)
    names = await worker.park(49, lambda: lock(1))
    await worker.submit("newcomer")
    await worker.step(lambda: [lock(100)])
    assert worker.began == [], "it stands behind those that came before"
    await worker.all_steps(lambda: [lock(100)])
    assert worker.began == [*names, "newcomer"]


@pytest.mark.parametrize("lock", [slot, quota])
async def test_a_limit_that_is_lifted_is_noticed_without_newcomers(
    worker: Worker, redis: Redis, lock: Callable[[int], BaseLock]
) -> None:
    assert await lock(1).acquire(redis)
    names = await worker.park(49, lambda: lock(1))
    await worker.look(lock(1))
    await worker.all_steps(lambda: [lock(100)])
    assert worker.began == names


@pytest.mark.parametrize("lock", [slot, quota])
async def test_a_line_whose_limiter_is_off_drains_several_at_a_time(
    worker: Worker, redis: Redis, lock: Callable[[int], BaseLock]
) -> None:
    """Newcomers ask for nothing, and begin meanwhile."""
    assert await lock(1).acquire(redis)
    names = await worker.park(200, lambda: lock(1))
    await worker.look(lock(1))
    steps = 0
    while await worker.step(list):
        steps += 1
    assert worker.began == names
    assert steps <= len(names) / 10 + 1
    assert not await redis.exists(keys.LINES, line_key(lock(1)))


async def test_who_still_wants_a_limiter_that_is_off_for_others_waits_on_in_line(
    worker: Worker, redis: Redis
) -> None:
    assert await slot().acquire(redis)
    names = await worker.park(50, slot)
    await worker.look(slot())
    assert await worker.step(list) == 1
    async with Counted(redis) as counted:
        await worker.all_steps(lambda: [slot()])
    assert worker.began == names[:1]
    assert await line_of(redis, slot()) == names[1:]
    assert counted.commands < BOUNDED


async def test_a_limit_that_is_lowered_holds_and_each_release_costs_one_look(worker: Worker, redis: Redis) -> None:
    await worker.submit(*"abcd")
    assert await worker.step(lambda: [slot(4)]) == 4
    names = await worker.park(5, lambda: slot(1))
    for name in "abc":
        await worker.end(name)
        await worker.all_steps(lambda: [slot(1)])
    assert worker.began == [*"abcd"]
    await worker.end("d")
    await worker.all_steps(lambda: [slot(1)])
    assert worker.began == [*"abcd", names[0]]
    assert await line_of(redis, slot()) == names[1:]


@pytest.mark.parametrize("lock", [mutex, writes, slot, quota])
async def test_newcomers_do_not_overtake_a_line_for_a_lock_that_is_free(
    worker: Worker, redis: Redis, lock: Callable[[], BaseLock]
) -> None:
    assert await lock().acquire(redis)
    first, second = await worker.park(2, lock)
    await redis.delete(lock().redis_key)  # it has expired, and the timer has not looked yet
    await worker.submit("newcomer")
    assert await worker.step(lambda: [lock()]) == 0
    assert await worker.step(lambda: [lock()]) == 1
    assert worker.began == [first]
    assert await line_of(redis, lock()) == [second, "newcomer"]


async def test_readers_behind_a_writer_join_the_readers_that_newcomers_join(worker: Worker, redis: Redis) -> None:
    async def begins(name: str, lock: Callable[[], BaseLock]) -> int:
        await worker.submit(name)
        return await worker.step(lambda: [lock()])

    assert await begins("writer", writes) == 1
    for name, lock in [("reader", reads), ("next writer", writes), ("last reader", reads)]:
        assert await begins(name, lock) == 0
    await worker.end("writer")
    assert await worker.step(lambda: [reads()]) == 1
    due = await redis.zscore(keys.LINES, reads().redis_key)
    assert await begins("newcomer", reads) == 1
    assert await redis.zscore(keys.LINES, reads().redis_key) == due, "newcomers do not put the timer off"
    await worker.end("reader")

    await worker.look(reads())
    assert await worker.step(lambda: [reads()]) == 1
    assert worker.began == ["writer", "reader", "newcomer", "last reader"]
    assert await line_of(redis, reads()) == ["next writer"]
    await worker.end("newcomer")
    assert await worker.granted() == ["last reader"], "it holds the lock"
    await worker.end("last reader")
    assert await worker.granted() == ["next writer"]


async def test_readers_far_behind_writers_join_the_readers_that_have_the_lock(
    worker: Worker, redis: Redis
) -> None:
    """The timer looks at another part of the line each time."""
    assert await writes().acquire(redis)
    await worker.park(700, writes, "writer")
    readers = await worker.park(3, reads, "reader")
    await worker.park(700, writes, "x writer")
    await redis.delete(reads().redis_key)
    assert await reads().acquire(redis)
    for _ in range(200):  # each has a chance of one in three
        await worker.look(reads())
        await worker.step(lambda: [reads()])
        if len(worker.began) == len(readers):
            break
    assert sorted(worker.began) == readers
    due = await redis.zscore(keys.LINES, reads().redis_key)
    assert due is not None
    assert due < in_ms(datetime.now(UTC)) + 5_000, "it looks again soon"


async def test_limiters_of_tasks_that_know_different_limits_come_to_rest(worker: Worker, redis: Redis) -> None:
    """Each would let the other go, and be refused itself: that must not go on for ever."""
    limits = {"strict": 1, "lax": 10}
    assert await slot().acquire(redis)
    for name in ("strict", "lax"):
        await worker.submit(name)
        deliveries, _ = await worker.broker.fetch(BATCH)
        await worker.start(deliveries, lambda name=name: [slot(limits[name])])  # type: ignore[misc]
    for _ in range(10):
        deliveries, _ = await worker.broker.fetch(BATCH)
        for each in deliveries:
            await worker.start([each], lambda each=each: [slot(limits[name_of(each)])])  # type: ignore[misc]
    assert await worker.granted() == []


# --- data of earlier versions -------------------------------------------------------------------------------


@pytest.mark.parametrize("lock", [mutex, reads, slot])
@pytest.mark.parametrize("key_of", [line_key, turn_key, lambda _: keys.LINES], ids=["line", "turn", "timers"])
async def test_a_key_of_another_type_in_the_place_of_a_line_delays_its_tasks_at_most(
    worker: Worker, redis: Redis, key_of: Callable[[BaseLock], str], lock: Callable[[], BaseLock]
) -> None:
    holds = writes if lock is reads else lock
    await worker.submit("first")
    assert await worker.step(lambda: [holds()]) == 1
    await redis.rpush(key_of(lock()), "something else")
    await worker.submit("second")
    assert await worker.step(lambda: [lock()]) == 0
    await worker.end("first")
    if not await worker.granted():
        due = await redis.zscore(keys.DELAYED, "second")
        assert due < in_ms(datetime.now(UTC)) + 700_000, "it asks again by itself"
        await redis.zadd(keys.DELAYED, {"second": 0})
        await worker.broker.promote()
    assert await worker.step(lambda: [lock()]) == 1
    await worker.submit("third")
    assert await worker.step(lambda: [lock()]) == (lock is reads)


async def test_tasks_that_an_earlier_version_has_parked_wait_on_in_line(worker: Worker, redis: Redis) -> None:
    assert await mutex().acquire(redis)
    names = await worker.park(3, mutex)
    await redis.rename(line_key(mutex()), keys.WAITING_PREFIX + mutex().redis_key)
    await redis.pexpire(keys.WAITING_PREFIX + mutex().redis_key, 20_000)
    await redis.delete(keys.LINES)
    await redis.zadd(keys.DELAYED, dict.fromkeys(names, 0))
    await worker.broker.promote()
    assert await worker.step(lambda: [mutex()]) == 0
    assert await line_of(redis, mutex()) == names
    assert await redis.zscore(keys.LINES, mutex().redis_key) is not None


async def test_nothing_stays_of_a_line_whose_tasks_are_all_gone(worker: Worker, redis: Redis) -> None:
    holder = mutex()
    assert await holder.acquire(redis)
    await worker.park(120, mutex)
    await redis.delete(keys.DELAYED, keys.DELAYED_DATA, keys.DELAYED_REASONS)
    await holder.release(redis)
    async with asyncio.timeout(5):
        while await redis.exists(line_key(mutex()), keys.LINES):
            await worker.broker.promote()


# --- several locks ------------------------------------------------------------------------------------------

LONG_AGO_MS = 600_000


class ThreeSlots(ConcurrencyLimiter):
    limit = 3


def named(name: str, kind: type[MutexLock | ExclusiveRWLock | ConcurrencyLimiter] = MutexLock) -> BaseLock:
    return kind(JOB, name, ttl_ms=600_000)


async def waits_since(worker: Worker, name: str, ms_ago: int, needs: Callable[[], Sequence[BaseLock]]) -> None:
    """A task that was submitted so long ago asks for its locks, and is refused."""
    await worker.submit(name)
    [delivery], _ = await worker.broker.fetch(BATCH)
    seconds, _ = await worker.redis.time()
    since = str((int(seconds) * 1000 - ms_ago) * 1000)
    assert await worker.start([replace(delivery, since=since)], needs) == 0


async def all_step(worker: Worker, needs: Mapping[str, Callable[[], Sequence[BaseLock]]]) -> None:
    """Each task, "{what it needs}-{number}", that there is."""
    while deliveries := (await worker.broker.fetch(BATCH))[0]:
        for delivery in deliveries:
            await worker.start([delivery], needs[name_of(delivery).partition("-")[0]])


@pytest.mark.parametrize("kind", [MutexLock, ExclusiveRWLock, Slots, ThreeSlots])
@pytest.mark.parametrize("order", ["ab", "ba", "abc", "cab"])
async def test_a_task_of_several_locks_is_not_passed_by_for_ever_by_tasks_of_one_of_them(
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
    assert passed <= 2 * len(names), "once for each lock before it has the first turn, and on its way to the last"
    while worker.running:
        await worker.end(next(iter(worker.running)))
        await all_step(worker, needs)
    assert not await worker.redis.exists(keys.DELAYED, keys.LINES)
    assert not await worker.redis.keys(keys.TURN_PREFIX + "*")


@dataclass
class Kept:
    """`both` waits for `b`, which `b-0` has, and has kept its turn for `a`; `a-1` waits for that."""

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


async def test_a_turn_is_kept_for_a_tenth_of_the_time_that_its_task_has_waited(
    worker: Worker, redis: Redis
) -> None:
    scene = await kept(worker)
    seconds, _ = await redis.time()
    ends = int((await redis.get(turn_key(named("a")))).partition(b" ")[0])  # type: ignore[union-attr]
    assert LONG_AGO_MS / 10 - 5_000 < ends - int(seconds) * 1000 < LONG_AGO_MS / 10 + 5_000
    assert await scene.is_next_at("a") == []
    due = await redis.zscore(keys.LINES, named("a").redis_key)
    assert due is not None
    assert due < int(seconds) * 1000 + 10_000, "it is noticed within seconds that it waits no more"
    await worker.turn_ends(named("a"))
    assert await scene.is_next_at("a") == ["a-1"]


async def test_who_has_waited_for_seconds_only_keeps_no_turn(worker: Worker) -> None:
    await kept(worker, since_ms=5_000)
    assert worker.began[2:] == ["a-1"]


async def test_a_kept_turn_ends_when_its_task_is_cancelled(worker: Worker, redis: Redis) -> None:
    scene = await kept(worker)
    await worker.broker.cancel(["both-0"])
    assert await scene.is_next_at("a") == ["a-1"]


async def test_a_kept_turn_ends_when_the_lock_that_its_task_waits_for_is_not_taken(worker: Worker) -> None:
    scene = await kept(worker)
    await worker.end("b-0")
    [delivery], _ = await worker.broker.fetch(BATCH)
    assert name_of(delivery) == "both-0"
    assert await worker.broker.settle([Settlement(delivery)]) == [True]
    assert await scene.is_next_at("a") == ["a-1"]


async def test_who_stands_before_a_task_takes_the_lock_that_is_kept_for_it(worker: Worker) -> None:
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
    assert (await redis.exists(turn_key(slots))) == 0, "and no turn, which would keep others from the rest"
    holders = await operations.lock(redis, slots.redis_key)
    assert "kept:both-0" in str(holders), "an operator sees for which task"
    await worker.end("b-0")
    await all_step(worker, needs)
    assert worker.began[5:] == ["both-0"]
    await worker.end("a-2")
    await all_step(worker, needs)
    assert worker.began[6:] == ["a-4"], "the slot that it kept is the one that it has"


@pytest.mark.parametrize("order", ["qb", "bq"])
async def test_a_task_of_a_rate_limiter_and_a_lock_is_not_passed_by_for_ever(
    worker: Worker, redis: Redis, order: str
) -> None:
    quota = Quota(JOB, "q")
    locks: dict[str, Callable[[], BaseLock]] = {"q": lambda: Quota(JOB, "q"), "b": lambda: named("b")}
    needs: dict[str, Callable[[], Sequence[BaseLock]]] = {
        "q": lambda: [locks["q"]()],
        "b": lambda: [locks["b"]()],
        "both": lambda: [locks[name]() for name in order],
    }
    await worker.submit("q-0", "b-0")
    await all_step(worker, needs)
    await waits_since(worker, "both-0", LONG_AGO_MS, needs["both"])
    for number in range(1, 10):
        await worker.submit(f"q-{number}", f"b-{number}")
        await all_step(worker, needs)
        for name in [each for each in worker.running if each != "both-0"]:
            await worker.end(name)
            await all_step(worker, needs)
        await redis.delete(quota.redis_key)  # its window is over
        await worker.look(quota)
        await all_step(worker, needs)
        if "both-0" in worker.began:
            break
    assert worker.began.index("both-0") - 2 <= 4
