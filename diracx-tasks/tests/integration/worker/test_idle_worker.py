"""Costs of an idle worker."""

from __future__ import annotations

import asyncio
from typing import Any

import msgpack
import pytest
from diracx.tasks import operations as monitor
from diracx.tasks.operations.health import HealthThresholds
from diracx.tasks.plumbing import BaseLock, BaseTask, MutexLock
from diracx.tasks.plumbing.broker import RedisStreamBroker, dead_letter_stream, keys, scripts, worker_state
from diracx.tasks.plumbing.broker.lease_audit import AUDIT_LEASES
from diracx.tasks.plumbing.broker.models import Delivery, TaskMessage
from diracx.tasks.plumbing.lock_registry import TASK
from diracx.tasks.plumbing.locks import lock_specs
from diracx.tasks.plumbing.registry import TaskRegistry
from diracx.tasks.plumbing.worker import Worker, reporter
from diracx.tasks.plumbing.worker import keeper as keeper_module
from diracx.tasks.plumbing.worker.keeper import LeaseKeeper, PendingAck
from diracx.tasks.plumbing.worker.reporter import Reporter
from diracx.tasks.plumbing.worker.settings import WorkerSettings
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from support.waiting import clients_wait, until

pytestmark = pytest.mark.event_loops("asyncio", "uvloop")


async def new_calls(redis: Redis, before: dict[str, int] | None = None) -> dict[str, int]:
    """Count the calls of each command on the server, inside scripts or not, since `before`."""
    stats = await redis.info("commandstats")
    calls = {name.removeprefix("cmdstat_"): each["calls"] for name, each in stats.items()}
    known = before or {}
    return {name: number - known.get(name, 0) for name, number in calls.items() if number != known.get(name, 0)}


async def test_most_reports_are_left_out_while_there_is_nothing_new(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[int] = []
    tell = worker_state.report

    async def counted(redis: Redis, worker: str, number: int, *rest: Any) -> Any:
        reported.append(number)
        return await tell(redis, worker, number, *rest)

    monkeypatch.setattr(worker_state, "report", counted)
    line = {"size": "medium", "memory_bytes": 1}
    broker = RedisStreamBroker(redis_url)
    try:
        worker_reporter = Reporter(broker, WorkerSettings(), ())
        monkeypatch.setattr(worker_reporter, "state", lambda: line)
        for _ in range(2 * (reporter.MAX_SKIPPED + 1) + 1):
            await worker_reporter.report(if_new=True)
        assert len(reported) == 3

        line["memory_bytes"] = 2
        await worker_reporter.report(if_new=True)
        assert len(reported) == 3, "memory changes all the time"
        line["size"] = "large"
        await worker_reporter.report(if_new=True)
        worker_reporter.rejected(None, "unparsable", "no task")
        await worker_reporter.report(if_new=True)
        assert len(reported) == 5, "changes are reported at once"
        worker_reporter.dataset = lambda: "another"
        await worker_reporter.report(if_new=True)
        assert len(reported) == 6, "and all of it when the server has lost its data"
        await worker_reporter.report(last=True)
    finally:
        await broker.shutdown()
    # One that does not get through is not missed: the next comes in time.
    assert HealthThresholds().silent_seconds > (reporter.MAX_SKIPPED + 2) * reporter.REPORT_SECONDS


async def test_a_heartbeat_without_changes_sends_four_commands(redis: Redis) -> None:
    minutes: set[int] = set()
    while len(minutes) != 1:  # the first report of a minute renews what expires
        minutes.clear()
        now_ms, *_ = await worker_state.report(redis, "host:1:x", 1, b"line", b"running", {}, False)
        minutes.add(now_ms // 60_000)
        before = await new_calls(redis)
        now_ms, known, _ = await worker_state.report(redis, "host:1:x", 2, b"", b"", {}, False)
        minutes.add(now_ms // 60_000)
        calls = await new_calls(redis, before)
    assert known
    assert calls == {"info": 1, "evalsha": 1, "time": 1, "hmget": 1, "zadd": 1}
    assert await redis.zscore("diracx:monitor:reporting", "host:1:x") == now_ms
    await worker_state.report(redis, "host:1:x", 3, b"", b"", {}, True)


async def test_statistics_lost_with_the_data_of_the_server_are_reported_again(redis: Redis) -> None:
    await worker_state.report(redis, "host:1:x", 1, b"line", b"running", {}, False)
    await redis.flushall()
    assert (await worker_state.report(redis, "host:1:x", 2, b"", b"", {}, False))[1] is False
    assert await redis.pttl("diracx:monitor:reporting") > 0
    assert await redis.pttl("diracx:monitor:worker:host:1:x") > 0
    assert [worker.name for worker in await monitor.workers(redis)] == ["host:1:x"]


class Rings(BaseTask):
    """Says that it runs."""

    rung: asyncio.Event

    async def execute(self) -> None:
        Rings.rung.set()


class Takes(Rings):
    """Takes so long that its worker waits for more beside it."""

    async def execute(self) -> None:
        Rings.rung.set()
        await asyncio.sleep(0.05)


@pytest.mark.parametrize(("task", "most"), [(Rings, 8.5), (Takes, 12)])
async def test_a_task_costs_the_server_the_same_however_many_workers_wait_for_it(
    redis_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch, task: type[Rings], most: float
) -> None:
    monkeypatch.setattr(reporter, "REPORT_SECONDS", 600.0)
    settings = {"housekeeping_seconds": 600.0, "lease_seconds": 600.0, "result_ttl_seconds": None}
    async with TaskSystem(
        [task], redis_url=redis_url, workers=8, scheduler=False, task_db_url=None, settings=settings
    ):

        async def runs(tasks: int) -> None:
            for _ in range(tasks):
                Rings.rung = asyncio.Event()
                await task().schedule()
                await Rings.rung.wait()
                await until(lambda: redis.xlen("diracx:tasks:normal:medium"), when=lambda length: not length)
                await clients_wait(redis, 8)

        await runs(9)  # the server knows all scripts from here on
        before = await new_calls(redis)
        await runs(20)
        new_commands = await new_calls(redis, before)
    ours = {name: calls for name, calls in new_commands.items() if name not in ("info", "xlen", "client|list")}
    assert sum(ours.values()) <= 20 * most, ours


class Held(BaseTask):
    over: asyncio.Event
    begun: asyncio.Event

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(TASK, "held")]

    async def execute(self) -> None:
        Held.begun.set()
        await Held.over.wait()


@pytest.mark.parametrize("busy", [False, True])
async def test_a_worker_has_three_connections_however_many_it_has_needed(
    redis_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch, busy: bool
) -> None:
    """One waits for messages, one renews the lease and listens to channels, one is for commands."""
    monkeypatch.setattr(reporter, "REPORT_SECONDS", 0.05)
    broker, stop = RedisStreamBroker(redis_url), asyncio.Event()
    before = len(await redis.client_list())
    worker = Worker(broker, TaskRegistry.of({"test:Held": Held}))
    running = asyncio.create_task(worker.run(stop))
    await worker.ready.wait()
    Held.begun, Held.over = asyncio.Event(), asyncio.Event()
    if busy:
        message = TaskMessage(task_id="held", task_name="test:Held")
        await redis.xadd("diracx:tasks:normal:medium", {"data": message.dumpb()})
        await Held.begun.wait()
    await asyncio.gather(*(broker.redis.ping() for _ in range(20)))
    await until(redis.client_list, when=lambda clients: len(clients) - before == 3)
    await clients_wait(redis)
    Held.over.set()
    stop.set()
    await running
    await broker.shutdown()


async def test_a_connection_that_was_closed_as_spare_is_not_taken_for_lost(redis_url: str) -> None:
    """A new connection may lead to another server, so that a worker fetches all its deliveries again."""
    broker = RedisStreamBroker(redis_url)
    await asyncio.gather(*(broker.redis.ping() for _ in range(5)))
    await broker.close_spare_connections(0, keep=0)
    await asyncio.gather(*(broker.redis.ping() for _ in range(5)))
    assert broker.reconnects == 0
    await broker.shutdown()


async def test_an_idle_promotion_costs_two_commands(redis: Redis) -> None:
    await scripts.promote(redis, 500)  # the server knows the script from here on
    before = await new_calls(redis)
    assert await scripts.promote(redis, 500) == (0, None, 0, 0, False, 0)
    assert await new_calls(redis, before) == {"info": 1, "evalsha": 1, "exists": 1}


async def test_an_idle_reclaim_costs_five_commands(redis_url: str, redis: Redis) -> None:
    brokers = [RedisStreamBroker(redis_url) for _ in range(3)]
    for broker in brokers:
        await broker.reclaim(1, lease_seconds=30)
    before = await new_calls(redis)
    assert (await brokers[0].reclaim(1, lease_seconds=30))[0] == []
    calls = await new_calls(redis, before)
    assert calls == {"info": 1, "evalsha": 1, "time": 1, "zscore": 1, "zrange": 2}
    for broker in brokers:
        await broker.leave()
        await broker.shutdown()


async def test_a_poll_for_dead_letters_sends_two_commands(redis: Redis) -> None:
    look = {"lease_ms": 1000, "at_most": 10, "at_most_bytes": 1000}
    assert await dead_letter_stream.dead_letters(redis, "worker", "-", **look) == []
    before = await new_calls(redis)
    assert await dead_letter_stream.dead_letters(redis, "worker", "-", **look) == []
    assert await new_calls(redis, before) == {"info": 1, "evalsha": 1, "exists": 1}


@pytest.mark.leaves_keys("diracx:tasks:*")
async def test_an_idle_worker_sends_less_than_one_command_per_second(redis_url: str, redis: Redis) -> None:
    """Its periodic work, at the default intervals, with the commands inside scripts."""
    settings = WorkerSettings()
    broker = RedisStreamBroker(redis_url)

    async def of(step: Any) -> int:
        """Return the commands of a call that is not the first of its script or of a minute, which send more."""
        counts = []
        for _ in range(4):
            before = await new_calls(redis)
            await step()
            counts.append(sum((await new_calls(redis, before)).values()) - 1)
        return min(counts)

    async def renew() -> None:
        async with LeaseKeeper(redis_url, broker.consumer_name, 30, asyncio.get_running_loop()) as keeper:
            await keeper.renew()
            before = await new_calls(redis)
            await keeper.renew(complete=False)
            of_renewal.append(sum((await new_calls(redis, before)).values()) - 1)

    of_renewal: list[int] = []
    await renew()
    await broker.fetch(1)
    worker_reporter = Reporter(broker, settings, ())
    lease, look = settings.lease_seconds, {"lease_ms": 1000, "at_most": 10, "at_most_bytes": 1000}
    per_second = (
        (of_renewal[0] + 3 / keeper_module.COMPLETE_EVERY) / (lease / 3)
        + await of(lambda: broker.reserve_next(1, 0.001)) / (lease * 0.6)
        + await of(lambda: broker.reclaim(1, lease_seconds=lease)) / (AUDIT_LEASES * lease)
        + await of(lambda: broker.fetch_unacknowledged([], [])) / (AUDIT_LEASES * lease)
        + await of(worker_reporter.report) / ((reporter.MAX_SKIPPED + 1) * reporter.REPORT_SECONDS)
        + await of(broker.promote) / settings.housekeeping_seconds
        + await of(lambda: dead_letter_stream.dead_letters(redis, "worker", "-", **look)) / settings.import_seconds
    )
    assert of_renewal == [5]
    assert per_second < 1
    await worker_reporter.leave()
    await broker.leave()
    await broker.shutdown()


@pytest.mark.leaves_keys("diracx:tasks:*")
async def test_a_worker_renews_at_its_usual_interval_again_after_a_task_with_a_short_lock(
    redis_url: str, redis: Redis
) -> None:
    delivery = Delivery(stream="diracx:tasks:normal:medium", entry="1-1", deliveries=1, data=b"", raw=b"")
    async with LeaseKeeper(redis_url, "worker", 30, asyncio.get_running_loop()) as keeper:
        keeper.add([PendingAck(delivery, lock_specs([MutexLock(TASK, "short", ttl_ms=30)]))])
        keeper.forget([delivery])

        async def is_quiet() -> bool:
            before = await new_calls(redis)
            await asyncio.sleep(0.2)
            return "evalsha" not in await new_calls(redis, before)

        await until(is_quiet)


class Idle(Reporter):
    """The reporter of a worker which has reported everything except the statistics of one task."""

    def state(self) -> dict[str, Any]:
        return {"size": "medium"}


def ended(redis_url: str, name: str, **how: int) -> Reporter:
    return Idle(RedisStreamBroker(redis_url, consumer_name=name), WorkerSettings(), (), **how)


async def finish(worker_reporter: Reporter, tasks: int = 1) -> None:
    sums = worker_reporter._stats.setdefault(("task", "diracx:tasks:normal:medium"), reporter.TaskCounters())
    sums.done += tasks


async def counted(redis: Redis) -> tuple[float, int]:
    """Count ended tasks: in the counts of all minutes, and in the throughput of their queue."""
    minutes = [
        msgpack.unpackb(sums)
        async for key in redis.scan_iter(keys.MINUTE_PREFIX + "*")
        for sums in await redis.hvals(key)
    ]
    flows = [
        await redis.hget(key, "diracx:tasks:normal:medium ended")
        async for key in redis.scan_iter(keys.THROUGHPUT_PREFIX + "*")
    ]
    return sum(sums["done"] for sums in minutes), sum(int(flow or 0) for flow in flows)


async def test_a_heartbeat_with_finished_tasks_sends_one_command(redis_url: str, redis: Redis) -> None:
    workers = [ended(redis_url, f"host:{number}:x") for number in range(5)]
    for worker_reporter in workers:
        await worker_reporter.report()
    for worker_reporter in workers:
        await finish(worker_reporter)
    await workers[0].report(if_new=True)
    before = await new_calls(redis)
    for worker_reporter in workers[1:]:
        await worker_reporter.report(if_new=True)
    assert await new_calls(redis, before) == {"info": 1, "rpush": 4}
    assert await counted(redis) == (0, 0)
    await workers[1].report(if_new=True)
    assert await counted(redis) == (0, 0), "it is another's to add them up"
    await workers[0].report(if_new=True)
    assert await counted(redis) == (5, 5)
    await leave(workers)


async def test_counters_that_are_sent_twice_count_once(redis_url: str, redis: Redis) -> None:
    first, _ = workers = [ended(redis_url, name) for name in ("host:1:x", "host:2:x")]
    for worker_reporter in workers:
        await worker_reporter.report()
        await finish(worker_reporter)
        await worker_reporter.report(if_new=True)
    [_, sums] = await redis.lrange(keys.SUMS, 0, -1)
    await redis.rpush(keys.SUMS, sums)  # its reply was lost
    await first.report(if_new=True)
    await redis.rpush(keys.SUMS, sums)  # and comes once more, after the others were added up
    first.adds_up = True
    await first.report()
    assert await counted(redis) == (2, 2)
    assert not await redis.exists(keys.SUMS)
    await leave(workers)


async def test_statistics_of_a_dead_worker_are_added_by_another_one(redis_url: str, redis: Redis) -> None:
    dead, other = workers = [ended(redis_url, name) for name in ("host:1:x", "host:2:x")]
    for worker_reporter in workers:
        await worker_reporter.report()
    await finish(dead)
    await dead.report(if_new=True)
    await other.report()
    assert await counted(redis) == (0, 0)
    assert await redis.pttl(keys.SUMS) > 0
    later = ended(redis_url, "host:3:x", sums_old_ms=-1000)
    await later.report()
    await later.report()
    assert await counted(redis) == (1, 1)
    await leave([*workers, later])


async def test_any_number_of_counters_is_added_in_calls_of_bounded_size(redis_url: str, redis: Redis) -> None:
    worker_reporter = ended(redis_url, "host:1:x")
    await worker_reporter.report()
    sums = [scripts.pack([f"w{number}", 1, {"stats": {"task": {"done": 1}}}]) for number in range(450)]
    await redis.rpush(keys.SUMS, *sums)
    worker_reporter.adds_up = True
    calls = 0
    while worker_reporter.adds_up:
        await worker_reporter.report(if_new=True)
        calls += 1
    assert calls == 3
    assert (await counted(redis))[0] == 450
    await leave([worker_reporter])


@pytest.mark.parametrize("wrong", ["list", "string"])
async def test_unreadable_counters_delay_nothing(redis_url: str, redis: Redis, wrong: str) -> None:
    worker_reporter = ended(redis_url, "host:1:x")
    await worker_reporter.report()
    if wrong == "list":
        await redis.rpush(keys.SUMS, b"\xc1", "invalid")
    else:
        await redis.set(keys.SUMS, "invalid")
    await finish(worker_reporter)
    await worker_reporter.report(if_new=True)
    await finish(worker_reporter)
    await worker_reporter.report()
    assert (await counted(redis))[0] in (1, 2)
    worker_reporter.adds_up = True
    await worker_reporter.report()
    await redis.delete(keys.SUMS)
    await leave([worker_reporter])


async def leave(workers: list[Reporter]) -> None:
    for worker_reporter in workers:
        await worker_reporter.leave()
        await worker_reporter._broker.shutdown()
