"""Leases of workers, and recovery of the tasks of dead ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from diracx.tasks.plumbing import BaseTask, MutexLock
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys, worker_state
from diracx.tasks.plumbing.broker.models import Settlement, Submission, TaskMessage
from diracx.tasks.plumbing.broker.replies import ACCEPTED, TAKEN_OVER
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.plumbing.registry import TaskRegistry
from diracx.tasks.plumbing.worker import worker as worker_module
from diracx.tasks.plumbing.worker.keeper import LeaseKeeper
from diracx.tasks.plumbing.worker.settings import WorkerSettings
from diracx.tasks.plumbing.worker.worker import Worker
from redis import Redis as SyncRedis
from redis.asyncio import Redis
from support.silent_worker import stays_silent
from support.waiting import until

BEGUN: list[int] = []


@dataclass
class Locked(BaseTask):
    number: int

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(JOB, self.number)]

    async def execute(self) -> None:
        BEGUN.append(self.number)
        await asyncio.sleep(0.1)


QUEUE = "diracx:tasks:normal:medium"
LEASE_MS = 30_000
ENDED = 1
"""An expired lease (ms since the epoch)."""

pytestmark = pytest.mark.leaves_keys("diracx:tasks:*")


@pytest.fixture
async def workers(redis_url: str) -> AsyncIterator[tuple[RedisStreamBroker, RedisStreamBroker]]:
    pair = (
        RedisStreamBroker(redis_url, consumer_name="first"),
        RedisStreamBroker(redis_url, consumer_name="second"),
    )
    yield pair
    for broker in pair:
        await broker.shutdown()


def renew(broker: RedisStreamBroker, *deliveries: object) -> list[int]:
    entries = [{name: getattr(d, name) for name in ("stream", "entry", "deliveries")} for d in deliveries]
    with SyncRedis.from_url(broker.url) as redis:
        return worker_state.renew(redis, broker.consumer_name, LEASE_MS, entries, [])[0]


async def submit(broker: RedisStreamBroker) -> None:
    await broker.submit([Submission(TaskMessage(task_id="task", task_name="test:Task"), QUEUE)])


@pytest.mark.parametrize("comes_back", ["by a renewal", "by a settlement", "by both, twice"])
async def test_P9_a_worker_that_returns_does_not_count_as_dead(
    workers: tuple[RedisStreamBroker, RedisStreamBroker], redis: Redis, comes_back: str
) -> None:
    """Two healthy workers whose network is cut in turn: no worker has died, the task is not poison."""
    owner, other = workers
    await submit(owner)
    [delivery], _ = await owner.fetch(1)
    for _ in range(5):
        renew(other)
        await redis.zadd(keys.ALIVE, {owner.consumer_name: ENDED})
        [taken], *_ = await other.reclaim(1, max_deliveries=3)
        assert taken.redelivery_count == 1
        for _ in range(2 if "twice" in comes_back else 1):
            if "settlement" not in comes_back:
                assert renew(owner, delivery) == [0], "the task is not its own any more"
            if "renewal" not in comes_back:
                assert await owner.settle([Settlement(delivery)]) == [TAKEN_OVER]
        owner, other, delivery = other, owner, taken


async def test_P9_workers_that_do_not_return_count_as_dead(
    workers: tuple[RedisStreamBroker, RedisStreamBroker], redis: Redis
) -> None:
    owner, other = workers
    await submit(owner)
    [delivery], _ = await owner.fetch(1)
    for times in range(1, 4):
        renew(other)
        await redis.zadd(keys.ALIVE, {owner.consumer_name: ENDED})
        if times == 3:
            assert (await other.reclaim(1, max_deliveries=3))[0] == [], "it may yet come back"
            stays_silent(owner.url, owner.consumer_name)
        [delivery], *_ = await other.reclaim(1, max_deliveries=3)
        assert delivery.redelivery_count == times
        owner, other = other, owner


@pytest.mark.parametrize("lease_ms", [1000, LEASE_MS])
async def test_P9_a_poison_task_stays_with_its_last_worker_for_three_of_its_leases(
    workers: tuple[RedisStreamBroker, RedisStreamBroker], redis: Redis, lease_ms: int
) -> None:
    """The server cannot distinguish a dead worker from one that is cut off."""
    owner, other = workers
    await submit(owner)
    await owner.fetch(1)
    renew(other)
    await redis.zadd(keys.ALIVE, {owner.consumer_name: ENDED})
    await redis.zadd(keys.LEASES, {owner.consumer_name: lease_ms})
    for _ in range(2):
        taken, again_seconds, _ = await other.reclaim(1, max_deliveries=1)
        assert taken == []
        assert again_seconds <= 3 * lease_ms / 1000
    [delivery] = await owner.fetch_unacknowledged([])
    assert renew(owner, delivery) == [], "it is its own still"
    assert (await other.reclaim(1, max_deliveries=1))[0] == []
    assert await owner.settle([Settlement(delivery)]) == [ACCEPTED]


async def test_P9_a_poison_task_is_rejected_when_its_last_worker_stays_silent(
    workers: tuple[RedisStreamBroker, RedisStreamBroker], redis: Redis
) -> None:
    owner, other = workers
    await submit(owner)
    await owner.fetch(1)
    renew(other)
    await redis.zadd(keys.ALIVE, {owner.consumer_name: ENDED})
    await redis.zadd(keys.LEASES, {owner.consumer_name: 200})
    began = time.monotonic()
    while not (found := await other.reclaim(1, max_deliveries=1))[0]:
        await asyncio.sleep(0.02)  # it renews at the pace of the shortest lease, and the server is not away
        renew(other)
    assert time.monotonic() - began >= 0.6
    assert found[0][0].deliveries == 2
    assert await redis.zscore(keys.LEASES, owner.consumer_name) is None


async def test_P9_an_outage_of_the_server_does_not_count_as_silence_of_a_worker(
    workers: tuple[RedisStreamBroker, RedisStreamBroker], redis: Redis
) -> None:
    owner, other = workers
    await submit(owner)
    await owner.fetch(1)
    renew(other)
    await redis.zadd(keys.ALIVE, {owner.consumer_name: ENDED})
    await redis.zadd(keys.LEASES, {owner.consumer_name: LEASE_MS})
    assert (await other.reclaim(1, max_deliveries=1))[0] == []
    stays_silent(owner.url, owner.consumer_name)
    await redis.set(keys.RENEWED, ENDED)
    await redis.zadd(keys.ALIVE, {other.consumer_name: ENDED})
    assert (await other.reclaim(1, max_deliveries=1))[0] == []
    assert await redis.zscore(keys.ALIVE, owner.consumer_name) > 0, "it has a new lease"
    await redis.zadd(keys.ALIVE, {owner.consumer_name: ENDED})
    assert (await other.reclaim(1, max_deliveries=1))[0] == [], "and may come back after that as well"
    stays_silent(owner.url, owner.consumer_name)
    assert len((await other.reclaim(1, max_deliveries=1))[0]) == 1


@pytest.mark.parametrize("first_call", ["a renewal", "a fetch", "a look for dead workers"])
async def test_if_all_leases_have_expired_the_server_was_unavailable_and_no_worker_is_dead(
    workers: tuple[RedisStreamBroker, RedisStreamBroker], redis: Redis, first_call: str
) -> None:
    first, second = workers
    await submit(first)
    [delivery], _ = await first.fetch(1)
    await redis.zadd(keys.ALIVE, {first.consumer_name: ENDED, second.consumer_name: ENDED + 1, "third": ENDED})
    if first_call == "a renewal":
        renew(second)
    elif first_call == "a fetch":
        await second.fetch(1, lease_seconds=LEASE_MS / 1000)
    assert (await second.reclaim(1))[0] == []
    assert await first.settle([Settlement(delivery)]) == [ACCEPTED], "it goes on, and has run once"
    now_ms = int((await redis.time())[0]) * 1000
    assert await redis.zcount(keys.ALIVE, now_ms, "+inf") == 3


@pytest.mark.parametrize(("part_left", "dead"), [(0.33, False), (0.6, True)])
async def test_a_server_outage_longer_than_a_lease_loses_no_worker(
    workers: tuple[RedisStreamBroker, RedisStreamBroker], redis: Redis, part_left: float, dead: bool
) -> None:
    """Workers renew every third of a lease; the remaining time of the newest lease shows whether any could."""
    first, second = workers
    await submit(first)
    [delivery], _ = await first.fetch(1)
    now_ms = int((await redis.time())[0]) * 1000
    ends = {first.consumer_name: now_ms - 1000, second.consumer_name: now_ms + part_left * LEASE_MS}
    await redis.zadd(keys.ALIVE, ends)
    taken, *_ = await second.reclaim(1, lease_seconds=LEASE_MS / 1000)
    assert [message.entry for message in taken] == ([delivery.entry] if dead else [])
    assert await first.settle([Settlement(delivery)]) == [TAKEN_OVER if dead else ACCEPTED]


async def test_a_worker_that_has_left_gets_no_new_lease(
    workers: tuple[RedisStreamBroker, RedisStreamBroker], redis: Redis
) -> None:
    first, second = workers
    await submit(first)
    await first.fetch(1)
    assert not await first.leave(), "it still holds a message"
    renew(second)
    assert len((await second.reclaim(1))[0]) == 1


@pytest.mark.leaves_keys("lock:*")
async def test_fencing_tokens_rise_with_every_grant_even_after_a_loss_of_all_data(redis: Redis) -> None:
    tokens = []
    for round_ in range(4):
        lock = MutexLock(JOB, "x")
        assert lock.token is None
        assert await lock.acquire(redis)
        assert not await MutexLock(JOB, "x").acquire(redis)
        tokens.append(lock.token)
        await lock.release(redis)
        if round_ == 1:
            await redis.flushall()
    assert None not in tokens
    assert tokens == sorted(set(tokens)), "each is greater than the one before"


@pytest.mark.event_loops("asyncio", "uvloop")
async def test_a_task_with_locks_starts_after_a_late_renewal(
    redis_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failover the keeper may still wait for the old server, while the worker already uses the new one."""
    BEGUN.clear()
    settings = WorkerSettings(lease_seconds=1.0, max_deliveries=3, result_ttl_seconds=60)
    broker, stop = RedisStreamBroker(redis_url), asyncio.Event()
    kept = []

    class Kept(LeaseKeeper):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            kept.append(self)

    monkeypatch.setattr(worker_module, "LeaseKeeper", Kept)
    worker = Worker(broker, TaskRegistry({"test:Locked": Locked}), settings=settings)
    running = asyncio.create_task(worker.run(stop))
    await worker.ready.wait()
    [keeper] = kept
    with keeper._renewing:  # no renewal comes through
        await until(lambda: keeper.overdue)
        await broker.submit(
            [Submission(TaskMessage(task_id="late", task_name="test:Locked", task_args=[1]), QUEUE)]
        )
        await asyncio.sleep(0.5)
        assert BEGUN == []
    result = await broker.wait_result("late", timeout=20)
    assert (result.is_err, BEGUN) == (False, [1])
    stop.set()
    await running
    await broker.shutdown()


# --- leases of different lengths ---------------------------------------------------------------------------------

SHORT_MS, LONG_MS = 5_000, 60_000


@pytest.fixture
def sync(redis_url: str) -> Iterator[SyncRedis]:
    with SyncRedis.from_url(redis_url) as redis:
        yield redis


def renew_for(redis: SyncRedis, worker: str, lease_ms: int) -> int:
    """Returns the shortest lease of all."""
    return worker_state.renew(redis, worker, lease_ms, [], [])[4]


def let_pass(redis: SyncRedis, milliseconds: int, *, renewing: str | None = None) -> None:
    """Let time pass. `renewing`: a worker that renews all the time."""
    for worker in redis.zrangebyscore(keys.ALIVE, "(0", "+inf"):
        redis.zincrby(keys.ALIVE, -milliseconds, worker)
    renewed_ms, *known = (redis.get(keys.RENEWED) or b"0").split(b" ", 1)
    redis.set(keys.RENEWED, b" ".join([str(int(renewed_ms) - milliseconds).encode(), *known]))
    if renewing is not None:
        renew_for(redis, renewing, LONG_MS)


def left_ms(redis: SyncRedis, worker: str) -> float:
    seconds, microseconds = redis.time()
    return float(redis.zscore(keys.ALIVE, worker) or 0) - seconds * 1000 - microseconds / 1000


def near(milliseconds: float, expected: float) -> bool:
    return expected - 1000 < milliseconds <= expected + 1


def brief(redis: SyncRedis, worker: str, lease_ms: int, known: tuple[str, int]) -> tuple[str, int, int]:
    """A renewal that only checks for changes since the last one."""
    return worker_state.renew(redis, worker, lease_ms, [], [], *known)[3:]  # type: ignore[return-value]


def test_a_renewal_returns_the_time_until_a_lease_can_expire(sync: SyncRedis) -> None:
    renew_for(sync, "first", LONG_MS)
    let_pass(sync, 3_000)
    *known, quiet_ms = worker_state.renew(sync, "second", LONG_MS, [], [])[3:]
    assert near(quiet_ms, LONG_MS - 3_000)
    sync.zadd(keys.ALIVE, {"gone": 0})
    assert brief(sync, "second", LONG_MS, (known[0], known[1]))[2] == 0
    sync.zrem(keys.ALIVE, "gone", "first")
    renew_for(sync, "short", SHORT_MS)
    _, shortest_ms, quiet_ms = brief(sync, "second", LONG_MS, (known[0], known[1]))
    assert shortest_ms == SHORT_MS, "it keeps the pace of a worker that has come since"
    assert near(quiet_ms, SHORT_MS)


@pytest.mark.parametrize("lost", ["everything", "epoch", "renewed", "alive", "leases"])
def test_a_short_renewal_detects_data_lost_by_the_server(sync: SyncRedis, lost: str) -> None:
    dataset_id, shortest_ms = worker_state.renew(sync, "worker", LONG_MS, [], [])[3:5]
    assert brief(sync, "worker", LONG_MS, (dataset_id, shortest_ms))[:2] == (dataset_id, shortest_ms)
    sync.delete(*(sync.keys("*") if lost == "everything" else [f"diracx:tasks:{lost}"]))
    now = brief(sync, "worker", LONG_MS, (dataset_id, shortest_ms))
    if lost in ("epoch", "leases"):  # no other fault loses these alone: the next complete renewal notices
        now = worker_state.renew(sync, "worker", LONG_MS, [], [], dataset_id)[3:]
    assert (now[0] != dataset_id) == (lost in ("everything", "epoch"))
    assert sync.zscore(keys.LEASES, "worker") == LONG_MS
    assert left_ms(sync, "worker") > LONG_MS - 1000


@pytest.mark.parametrize("first_call", ["of a short lease", "of a long lease", "a look for dead workers"])
def test_after_an_outage_each_worker_gets_a_new_lease_of_its_own_length(
    sync: SyncRedis, redis_url: str, first_call: str
) -> None:
    """An unexpired long lease is no evidence for short ones: their workers could not renew either."""
    for worker in ("short", "other short", "signed off"):
        renew_for(sync, worker, SHORT_MS)
    renew_for(sync, "long", LONG_MS)
    sync.zadd(keys.ALIVE, {"signed off": 0})
    let_pass(sync, 7_000)
    if first_call == "of a short lease":
        renew_for(sync, "short", SHORT_MS)
    elif first_call == "of a long lease":
        renew_for(sync, "long", LONG_MS)
    else:
        asyncio.run(look_for_the_dead(redis_url, "long", LONG_MS))
    assert near(left_ms(sync, "other short"), SHORT_MS)
    if first_call != "of a long lease":
        assert near(left_ms(sync, "long"), LONG_MS - 7_000), "it could renew before its end: it may be dead"
    assert not sync.zscore(keys.ALIVE, "signed off")


async def look_for_the_dead(redis_url: str, worker: str, lease_ms: int, *, audit: bool = False) -> float:
    """Return the seconds until the next check."""
    broker = RedisStreamBroker(redis_url, consumer_name=worker)
    _, again_seconds, _ = await broker.reclaim(1, lease_seconds=lease_ms / 1000, audit=audit)
    await broker.shutdown()
    return again_seconds


def test_a_worker_with_a_long_lease_keeps_no_dead_one_alive(sync: SyncRedis, redis_url: str) -> None:
    """Neither by signing on, nor by its renewals."""
    renew_for(sync, "dies", SHORT_MS)
    let_pass(sync, 2_000, renewing="lives")
    let_pass(sync, 2_000, renewing="lives")
    renew_for(sync, "comes", LONG_MS)
    assert near(left_ms(sync, "dies"), 1_000)
    let_pass(sync, 1_500)
    asyncio.run(look_for_the_dead(redis_url, "lives", LONG_MS))
    for listed in (keys.ALIVE, keys.LEASES):
        assert set(sync.zrange(listed, 0, -1)) == {b"lives", b"comes"}


def test_workers_renew_at_the_interval_of_the_shortest_lease(sync: SyncRedis) -> None:
    with sync.pubsub(ignore_subscribe_messages=True) as channel:
        channel.subscribe(keys.LEASES)
        channel.get_message(timeout=10)
        assert renew_for(sync, "long", LONG_MS) == LONG_MS
        assert renew_for(sync, "short", SHORT_MS) == SHORT_MS
        assert renew_for(sync, "long", LONG_MS) == SHORT_MS
        message = channel.get_message(timeout=10)
        assert message is not None
        assert message["data"] == str(SHORT_MS).encode()
        assert channel.get_message(timeout=0) is None, "once"
    worker_state.leave_now(sync, "short")
    assert renew_for(sync, "long", LONG_MS) == LONG_MS


def test_a_worker_checks_again_before_the_lease_of_a_new_worker_can_expire(
    sync: SyncRedis, redis_url: str
) -> None:
    renew_for(sync, "short", SHORT_MS)
    sync.zadd(keys.ALIVE, {"short": 2**45})
    again_seconds = asyncio.run(look_for_the_dead(redis_url, "long", LONG_MS))
    assert again_seconds <= SHORT_MS / 1000


@pytest.mark.parametrize("lost", ["the ends", "the ends and the lengths"])
def test_an_unlisted_worker_gets_its_own_lease_or_the_longest_known(
    sync: SyncRedis, redis_url: str, lost: str
) -> None:
    async def take() -> None:
        for name, lease_ms in (("long", LONG_MS), ("short", SHORT_MS)):
            broker = RedisStreamBroker(redis_url, consumer_name=name)
            await submit(broker)
            await broker.fetch(1, lease_seconds=lease_ms / 1000)
            await broker.shutdown()

    asyncio.run(take())
    sync.delete(keys.ALIVE, *([keys.LEASES] if "lengths" in lost else []))
    asyncio.run(look_for_the_dead(redis_url, "looks", SHORT_MS, audit=True))
    known = lost == "the ends"
    assert near(left_ms(sync, "long"), LONG_MS if known else LEASE_MS)
    assert near(left_ms(sync, "short"), SHORT_MS if known else LEASE_MS)


def test_a_worker_of_an_earlier_release_counts_with_the_longest_lease_that_is_known(
    sync: SyncRedis, redis_url: str
) -> None:
    """An earlier release stores no lengths of leases, and removes none."""
    for worker, lease_ms in (("earlier", SHORT_MS), ("short", SHORT_MS), ("long", LONG_MS)):
        renew_for(sync, worker, lease_ms)
    sync.zrem(keys.LEASES, "earlier")
    let_pass(sync, 7_000)
    renew_for(sync, "short", SHORT_MS)
    assert left_ms(sync, "earlier") < 0
    let_pass(sync, 40_000)
    renew_for(sync, "short", SHORT_MS)
    assert near(left_ms(sync, "earlier"), LONG_MS)
    sync.zrem(keys.ALIVE, "long")  # taken for dead by it
    asyncio.run(look_for_the_dead(redis_url, "short", SHORT_MS, audit=True))
    assert sync.zrange(keys.LEASES, 0, -1) == [b"short"]
