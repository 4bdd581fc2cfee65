"""A worker fetches messages at once when it is idle, and never before it can start them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import pytest
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.broker.models import Delivery, Settlement, Submission, TaskMessage
from diracx.tasks.plumbing.broker.redis_streams import is_poison_candidate
from diracx.tasks.plumbing.worker.intake import Intake
from diracx.tasks.plumbing.worker.keeper import LeaseKeeper
from diracx.tasks.plumbing.worker.settings import WorkerSettings
from diracx.tasks.plumbing.worker.settlement import hand_back
from diracx.tasks.plumbing.worker.unread import UnreadGuard
from redis import Redis as SyncRedis
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

# What is in hand, or still queued, when the test ends.
pytestmark = [pytest.mark.leaves_keys("diracx:tasks:*"), pytest.mark.event_loops("asyncio", "uvloop")]

NORMAL, REALTIME = "diracx:tasks:normal:medium", "diracx:tasks:realtime:medium"


@pytest.fixture
async def broker(redis_url: str) -> AsyncIterator[RedisStreamBroker]:
    broker = RedisStreamBroker(redis_url)
    yield broker
    await broker.shutdown()


@pytest.fixture
def sync(redis_url: str) -> Iterator[SyncRedis]:
    with SyncRedis.from_url(redis_url) as redis:
        yield redis


def intake_of(
    broker: RedisStreamBroker,
    stop: asyncio.Event | None = None,
    *,
    idle: bool = True,
    held: Sequence[Delivery] = (),
    lease_seconds: float = 30,
    quiet_until: Callable[[], float] = lambda: 0.0,
) -> Intake:
    settings = WorkerSettings(lease_seconds=lease_seconds)
    places = lambda: [(each.stream, each.entry) for each in held]  # noqa: E731
    return Intake(broker, settings, stop or asyncio.Event(), places, lambda: idle, quiet_until=quiet_until)


def submission(task_id: str, stream: str = NORMAL) -> Submission:
    return Submission(TaskMessage(task_id=task_id, task_name="test:Task"), stream)


async def waits(redis: Redis) -> None:
    """Until a worker waits for news."""
    while not any(client["cmd"] == "xreadgroup" for client in await redis.client_list()):
        await asyncio.sleep(0.002)


async def in_hand(redis: Redis) -> int:
    if not await redis.exists(NORMAL):
        return 0
    return sum(group["pending"] for group in await redis.xinfo_groups(NORMAL))


async def evaluations(redis: Redis) -> int:
    stats = await redis.info("commandstats")
    return int(stats.get("cmdstat_evalsha", {"calls": 0})["calls"])


class CountsLooks(RedisStreamBroker):
    """Counts its looks for dead workers, with and without an audit."""

    looks: Counter[bool]

    async def reclaim(self, free: int, *, audit: bool = False, **options: Any) -> Any:
        self.looks[audit] += 1
        return await super().reclaim(free, audit=audit, **options)


@pytest.mark.parametrize("quiet", [True, False])
async def test_a_worker_looks_for_dead_ones_only_when_a_lease_may_have_ended(redis_url: str, quiet: bool) -> None:
    broker = CountsLooks(redis_url)
    broker.looks = Counter()
    intake = intake_of(broker, lease_seconds=1.1, quiet_until=lambda: time.monotonic() + 60 if quiet else 0.0)
    while broker.looks[True] < 2:
        assert await intake.next(10) == []
    assert (broker.looks[False] == 0) == quiet
    await broker.shutdown()


async def test_what_the_dead_have_left_is_looked_for_whatever_the_renewals_say(
    redis_url: str, redis: Redis
) -> None:
    """A worker that signs off or is taken for dead leaves before its lease would have ended."""
    broker = CountsLooks(redis_url)
    broker.looks = Counter()
    intake = intake_of(broker, quiet_until=lambda: time.monotonic() + 60)
    gone = RedisStreamBroker(redis_url)
    await broker.submit([submission(str(number)) for number in range(3)])
    assert len((await gone.fetch(3, lease_seconds=30))[0]) == 3
    assert not await gone.leave()
    for _ in range(3):
        assert len(await intake.next(1)) == 1
    for each in (broker, gone):
        await each.shutdown()


async def test_an_idle_worker_is_given_what_comes_without_asking_again(
    broker: RedisStreamBroker, redis: Redis
) -> None:
    intake = intake_of(broker)
    asked = asyncio.create_task(intake.next(10))
    await waits(redis)
    before = await evaluations(redis)
    await broker.submit([submission("one")])
    [delivery] = await asked
    assert await broker.settle([Settlement(delivery)]) == [True]
    asked = asyncio.create_task(intake.next(10))
    await waits(redis)
    await broker.submit([submission("two")])
    assert len(await asked) == 1
    # No step hands a message out; one settles the first.
    assert await evaluations(redis) - before == 1


async def test_an_idle_worker_is_given_the_most_urgent_of_what_comes_together(
    broker: RedisStreamBroker, redis: Redis
) -> None:
    asked = asyncio.create_task(intake_of(broker).next(1))
    await waits(redis)
    async with redis.pipeline(transaction=True) as pipe:
        for each in (submission("later"), submission("now", REALTIME)):
            pipe.xadd(each.stream, {"data": each.message.dumpb()})
        await pipe.execute()
    [delivery] = await asked
    assert delivery.stream == REALTIME


async def test_what_comes_together_for_a_worker_with_fewer_slots_stays_for_others(
    broker: RedisStreamBroker, redis: Redis
) -> None:
    """A waiting worker is given some of each stream; what cannot start is given back, and nothing is lost."""
    streams = [keys.stream_name_for(priority, "medium") for priority in ("realtime", "normal", "background")]
    for free in (1, 2, 3, 10):
        await redis.flushall()
        asked = asyncio.create_task(intake_of(broker).next(free))
        await waits(redis)
        async with redis.pipeline(transaction=True) as pipe:
            for each in streams[::-1]:
                pipe.xadd(each, {"data": submission(each).message.dumpb()})
            await pipe.execute()
        deliveries = await asked
        assert [each.stream for each in deliveries] == streams[:free]
        other = RedisStreamBroker(broker.url)
        rest, _ = await other.fetch(10)
        assert [name_of(each) for each in rest] == streams[free:]
        await other.shutdown()


async def test_one_message_is_given_to_one_of_those_that_wait_in_turn(redis_url: str, redis: Redis) -> None:
    brokers = [RedisStreamBroker(redis_url, consumer_name=str(number)) for number in range(4)]
    asked = []
    for number, each in enumerate(brokers):
        asked.append(asyncio.create_task(intake_of(each).next(10)))
        while sum(client["cmd"] == "xreadgroup" for client in await redis.client_list()) <= number:
            await asyncio.sleep(0.002)
    for waiting in asked:
        # As the published package submits: it calls nobody.
        await redis.xadd(NORMAL, {"data": submission("one").message.dumpb()})
        assert len(await waiting) == 1, "who has waited longest"
        assert await in_hand(redis) == sum(each.done() for each in asked)
    for each in brokers:
        await each.shutdown()


async def test_a_cancelled_task_that_reaches_a_waiting_worker_is_seen_to_be_cancelled(
    broker: RedisStreamBroker, redis: Redis
) -> None:
    asked = asyncio.create_task(intake_of(broker).next(10))
    await waits(redis)
    await redis.zadd(keys.CANCELLED, {"one": (time.time() + 60) * 1000})
    async with redis.pipeline(transaction=True) as pipe:
        for each in (submission("one"), submission("other", REALTIME)):
            pipe.xadd(each.stream, {"data": each.message.dumpb()})
        await pipe.execute()
    assert {name_of(each): each.cancelled for each in await asked} == {"one": True, "other": False}
    await redis.delete(keys.CANCELLED)


@pytest.mark.parametrize("idle", [True, False])
@pytest.mark.parametrize("command", ["FLUSHALL", f"DEL {NORMAL}", f"XGROUP DESTROY {NORMAL} {keys.GROUP}"])
async def test_streams_that_are_gone_while_a_worker_waits_are_made_anew(
    broker: RedisStreamBroker, redis: Redis, command: str, idle: bool
) -> None:
    intake = intake_of(broker, idle=idle)
    asked = asyncio.create_task(intake.next(10))
    await waits(redis)
    await redis.execute_command(*command.split())
    await broker.submit([submission("one")])
    deliveries = await asked
    while not deliveries:
        deliveries = await intake.next(10)
    assert [name_of(each) for each in deliveries] == ["one"]


async def test_many_short_tasks_that_come_together_are_fetched_together(
    broker: RedisStreamBroker, redis: Redis
) -> None:
    intake = intake_of(broker)
    asked = asyncio.create_task(intake.next(100))
    await waits(redis)
    await broker.submit([submission(str(number)) for number in range(200)])
    taken, calls = await asked, 1
    while len(taken) < 200:
        taken += await intake.next(100)
        calls += 1
    assert calls <= 8


@pytest.fixture
async def busy(broker: RedisStreamBroker) -> AsyncIterator[tuple[Intake, UnreadGuard]]:
    """Intake and guard of a worker that runs something."""
    loop = asyncio.get_running_loop()
    async with LeaseKeeper(broker.url, broker.consumer_name, 30, loop) as keeper:
        guard = UnreadGuard(loop, lambda: keeper.hand_back_unread(broker.streams))
        settings = WorkerSettings()
        yield Intake(broker, settings, asyncio.Event(), keeper.held, lambda: False, unread=guard), guard
        await asyncio.to_thread(guard.close)


async def test_a_worker_that_runs_something_is_given_what_comes(
    broker: RedisStreamBroker, redis: Redis, busy: tuple[Intake, UnreadGuard]
) -> None:
    intake, _ = busy
    at_once = 0
    for number in range(20):
        asked = asyncio.create_task(intake.next(10))
        await waits(redis)
        before = await evaluations(redis)
        await broker.submit([submission(str(number))])
        deliveries = await asked
        at_once += bool(deliveries) and await evaluations(redis) == before
        while not deliveries:  # a busy machine may hold up the event loop, too
            deliveries = await intake.next(10)
        assert [each.deliveries for each in deliveries] == [1]
        assert await broker.settle([Settlement(each) for each in deliveries]) == [True]
    assert at_once > 10, "it does not have to ask again"


@pytest.mark.parametrize("large", [False, True])
async def test_what_comes_while_a_task_blocks_the_event_loop_is_handed_back_for_others_to_start(
    redis_url: str,
    broker: RedisStreamBroker,
    redis: Redis,
    busy: tuple[Intake, UnreadGuard],
    sync: SyncRedis,
    large: bool,
) -> None:
    intake, _ = busy
    message = submission("one").message
    message.task_kwargs = {"value": "x" * (3_000_000 if large else 3)}
    sync.zadd(keys.CANCELLED, {"another": 2**52})
    asked = asyncio.create_task(intake.next(10))
    await waits(redis)
    occurrence = {"since": "17", "occurrence": "61"}
    sync.xadd(REALTIME, {"data": message.dumpb(), **occurrence})
    sync.xadd(NORMAL, {"data": submission("two").message.dumpb()})
    while not (moved := sync.xrange(REALTIME + keys.HANDOVER)):  # the event loop is blocked all the time
        time.sleep(0.01)
    assert sync.xlen(REALTIME) == 0
    assert {name.decode(): value.decode() for name, value in moved[0][1].items() if name != b"data"} == occurrence
    assert await asked == []
    other = RedisStreamBroker(redis_url)
    first, second = (await other.fetch(10))[0]
    assert [name_of(first), name_of(second)] == ["one", "two"]
    assert (first.deliveries, first.since) == (1, "17")
    assert await other.settle([Settlement(first), Settlement(second)]) == [True, True]
    await other.shutdown()
    asked = asyncio.create_task(intake.next(10))
    await waits(redis)
    await broker.submit([submission("three")])
    assert [name_of(each) for each in await asked] == ["three"], "it is given what comes as before"
    sync.delete(keys.CANCELLED)


async def test_what_cannot_be_handed_back_is_recovered_when_the_event_loop_goes_on(
    broker: RedisStreamBroker, redis: Redis, sync: SyncRedis
) -> None:
    tried: list[float] = []

    def fails() -> None:
        tried.append(time.monotonic())
        raise RedisConnectionError("the server is away")

    guard = UnreadGuard(asyncio.get_running_loop(), fails)
    intake = Intake(broker, WorkerSettings(), asyncio.Event(), tuple, lambda: False, unread=guard)
    asked = asyncio.create_task(intake.next(10))
    await waits(redis)
    sync.xadd(NORMAL, {"data": submission("one").message.dumpb()})
    while not tried:
        time.sleep(0.01)
    [delivery] = await asked
    assert (name_of(delivery), delivery.deliveries) == ("one", 1)
    await asyncio.to_thread(guard.close)


@pytest.mark.parametrize("idle", [True, False])
async def test_what_comes_while_a_worker_stops_is_found_or_was_never_taken(
    broker: RedisStreamBroker, redis: Redis, idle: bool
) -> None:
    for number in range(20):
        await redis.flushall()
        stop = asyncio.Event()
        intake = intake_of(broker, stop, idle=idle)
        asked = asyncio.create_task(intake.next(10))
        await waits(redis)
        submitting = asyncio.create_task(broker.submit([submission(str(number))]))
        for _ in range(number % 10):
            await asyncio.sleep(0)
        stop.set()
        await asked
        await intake.close()
        deliveries = await intake.recover()
        await submitting
        assert await in_hand(redis) == len(deliveries)


async def test_a_wait_that_was_ended_is_given_nothing_nor_is_one_that_arrives_later(
    broker: RedisStreamBroker, redis: Redis
) -> None:
    assert (await broker.fetch(10))[0] == []
    for _ in range(20):
        asked = asyncio.create_task(broker.reserve_next(10, timeout=60))
        await waits(redis)
        await broker.end_wait()
        await broker.submit([submission("one")])
        for late in (asked, broker.reserve_next(10, timeout=60)):
            with pytest.raises(ResponseError, match=r"^(NOGROUP|UNBLOCKED)"):
                await late
        assert await in_hand(redis) == 0
        [delivery] = (await broker.fetch(10))[0]
        assert await broker.settle([Settlement(delivery)]) == [True]
        assert (await broker.fetch(10))[0] == []


async def test_a_server_that_forgets_its_scripts_while_a_worker_waits_delivers_all_the_same(
    broker: RedisStreamBroker, redis: Redis
) -> None:
    asked = asyncio.create_task(intake_of(broker).next(10))
    await waits(redis)
    await redis.script_flush()
    await broker.submit([submission("one")])
    assert len(await asked) == 1


@pytest.mark.parametrize("idle", [True, False])
async def test_a_wait_is_over_before_the_connection_gives_up_on_its_answer(redis_url: str, idle: bool) -> None:
    broker = SaysOnce(redis_url, socket_timeout=1.0)
    assert await intake_of(broker, idle=idle).next(10) == [], "and no timeout"
    await broker.shutdown()


class SaysOnce(RedisStreamBroker):
    """Knows of no moment at which to look again for what the dead have left."""

    async def reclaim(self, free: int, **options: Any) -> tuple[list[Delivery], float, bool]:
        deliveries, _, make_room = await super().reclaim(free, **options)
        return deliveries, 3600.0, make_room


class Hands:
    """An intake with what its worker holds."""

    def __init__(self, broker: RedisStreamBroker) -> None:
        self.broker = broker
        self.held: list[Delivery] = []
        self.intake = Intake(
            broker,
            WorkerSettings(),
            asyncio.Event(),
            lambda: [(each.stream, each.entry) for each in self.held],
            lambda: not self.held,
        )

    async def take(self, free: int = 10) -> list[Delivery]:
        taken = await self.intake.next(free)
        self.held += taken
        return taken

    async def settle(self) -> None:
        settled, self.held = self.held, []
        assert all(await self.broker.settle([Settlement(each) for each in settled]))
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
        asked = asyncio.create_task(patient.take())
        await asyncio.sleep(0)
        await patient.settle()
        assert await asked == []


async def test_P9_a_worker_with_a_poison_candidate_fetches_nothing_else(
    redis_url: str, redis: Redis, patient: Hands
) -> None:
    await poison_candidates(redis_url, redis, "candidate")
    assert len(await patient.take()) == 1
    await patient.broker.submit([submission("fresh")])
    asked = asyncio.create_task(patient.take())
    for _ in range(20):  # each is a round trip
        await redis.ping()
    assert not asked.done()
    assert await in_hand(redis) == 1, "only the poison candidate"
    await patient.settle()
    assert await asked == []
    assert len(await patient.take()) == 1


async def test_P9_a_busy_worker_drains_for_a_poison_candidate(
    redis_url: str, redis: Redis, patient: Hands
) -> None:
    await patient.broker.submit([submission("at work")])
    assert len(await patient.take()) == 1
    await poison_candidates(redis_url, redis, "candidate")
    patient.intake._reclaim_at = 0.0  # the lease of the dead one has ended
    await patient.broker.submit([submission("fresh")])
    asked = asyncio.create_task(patient.take())
    while not await redis.exists(keys.ROOM_PREFIX + patient.broker.streams[0]):
        await asyncio.sleep(0.002)
    for _ in range(20):
        await redis.ping()
    assert not asked.done()
    await patient.settle()
    assert await asked == []
    [candidate] = await patient.take()
    assert candidate.redelivery_count == 2
    assert not await redis.exists(keys.ROOM_PREFIX + patient.broker.streams[0])


@pytest.mark.parametrize("beside", ["a task at work", "a task that comes with it", "a poison candidate"])
async def test_P9_a_poison_candidate_that_comes_through_a_queue_runs_alone(
    redis_url: str, redis: Redis, patient: Hands, beside: str
) -> None:
    """It has waited for a lock, or a worker that stopped has handed it back."""
    names = ("candidate", "another") if beside == "a poison candidate" else ("candidate",)
    if beside != "a task that comes with it":
        await patient.broker.submit([submission("at work")])
        assert len(await patient.take()) == 1
    await poison_candidates(redis_url, redis, *names)
    stopping = Hands(SaysOnce(redis_url))
    for _ in names:
        candidates = await stopping.take()
        assert all(await stopping.broker.settle([hand_back(each) for each in candidates]))
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


async def test_P9_among_any_number_of_poison_tasks_an_innocent_one_is_never_convicted(
    redis_url: str, redis: Redis
) -> None:
    """Every worker takes what it can get, and dies if poison is among it; new poison comes all the time."""
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
        asked = asyncio.create_task(hands.take())
        for _ in range(50):
            await redis.ping()
        asked.cancel()
        await asyncio.wait({asked})
        hands.held += await hands.broker.recover([(each.stream, each.entry) for each in hands.held])
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
    """As many as are waited for the last worker of a poison task."""
    for stream in streams:
        if await redis.exists(stream) and await redis.xinfo_groups(stream):
            for each in await redis.xpending_range(stream, keys.GROUP, "-", "+", 1000):
                entry, dead = each["message_id"], each["consumer"]
                await redis.xclaim(stream, keys.GROUP, dead, 0, [entry], idle=3_600_000, justid=True)


def name_of(delivery: Delivery) -> str:
    assert delivery.data is not None
    return TaskMessage.loadb(delivery.data).task_id


async def forgotten(broker: RedisStreamBroker) -> None:
    """Leave a task with us that we do not know of, as a new primary does that missed our settlement."""
    await broker.submit([submission("settled and lost")])
    same = RedisStreamBroker(broker.url, consumer_name=broker.consumer_name)
    assert len((await same.fetch(1, lease_seconds=30))[0]) == 1
    await same.shutdown()


async def test_an_unacknowledged_task_is_recovered_when_a_failover_ends_the_wait(
    broker: RedisStreamBroker, redis: Redis
) -> None:
    await forgotten(broker)
    asked = asyncio.create_task(intake_of(broker).next(10))
    await waits(redis)
    [waiting] = [client["id"] for client in await redis.client_list() if client["cmd"] == "xreadgroup"]
    await redis.execute_command("CLIENT", "UNBLOCK", waiting, "ERROR")  # as a primary does that becomes a replica
    assert [name_of(each) for each in await asked] == ["settled and lost"]


async def test_an_unacknowledged_task_is_recovered_after_a_reconnect_of_a_busy_worker(
    broker: RedisStreamBroker, redis: Redis
) -> None:
    """A worker at work does not wait for the server while it fails over: no call of it fails."""
    running: list[Delivery] = []
    intake = intake_of(broker, held=running)
    await broker.submit([submission("running")])
    running += await intake.next(10)
    assert [name_of(each) for each in running] == ["running"]
    await forgotten(broker)
    await redis.client_kill_filter(_type="normal", skipme=True)
    await broker.redis.ping()  # as the renewals of the lease do
    assert [name_of(each) for each in await intake.next(10)] == ["settled and lost"]


async def test_an_unacknowledged_task_is_recovered_with_the_next_audit(broker: RedisStreamBroker) -> None:
    """The failover may go unnoticed, as behind a proxy that keeps our connections open."""
    intake = intake_of(broker, lease_seconds=0.5)
    assert await intake.next(10) == []
    await forgotten(broker)
    async with asyncio.timeout(20):
        while not (deliveries := await intake.next(10)):
            pass
    assert [name_of(each) for each in deliveries] == ["settled and lost"]
