"""A worker with nothing to do asks the server for next to nothing, and is still known to live."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from diracx.tasks import operations as monitor
from diracx.tasks.operations.health import HealthThresholds
from diracx.tasks.plumbing import BaseTask
from diracx.tasks.plumbing.broker import RedisStreamBroker, scripts
from diracx.tasks.plumbing.registry import TaskRegistry
from diracx.tasks.plumbing.worker import Worker, reporter
from diracx.tasks.plumbing.worker.reporter import Reporter
from diracx.tasks.plumbing.worker.settings import WorkerSettings
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis

pytestmark = pytest.mark.event_loops("asyncio", "uvloop")


async def new_calls(redis: Redis, before: dict[str, int] | None = None) -> dict[str, int]:
    """How often the server was asked for each command, inside scripts or not, since `before`."""
    stats = await redis.info("commandstats")
    calls = {name.removeprefix("cmdstat_"): each["calls"] for name, each in stats.items()}
    known = before or {}
    return {name: number - known.get(name, 0) for name, number in calls.items() if number != known.get(name, 0)}


async def test_every_other_report_is_left_out_while_there_is_nothing_new(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    tell = scripts.report

    async def counted(redis: Redis, worker: str, number: int, *rest: Any) -> Any:
        told.append(number)
        return await tell(redis, worker, number, *rest)

    monkeypatch.setattr(scripts, "report", counted)
    line = {"size": "medium", "memory_bytes": 1}
    broker = RedisStreamBroker(redis_url)
    try:
        told_by = Reporter(broker, WorkerSettings(), ())
        monkeypatch.setattr(told_by, "_line", lambda: line)
        for _ in range(5):
            await told_by.report(if_new=True)
        assert told == [1, 2, 3], "the first, the third and the fifth"

        line["memory_bytes"] = 2
        await told_by.report(if_new=True)
        told_by.rejected(None, "unparsable", "no task")
        await told_by.report(if_new=True)
        assert told == [1, 2, 3, 4, 5], "what is new is told at once"
        await told_by.report(last=True)
    finally:
        await broker.shutdown()
    # One that does not get through is not missed: the next comes in time.
    assert HealthThresholds().silent_seconds > (reporter._LEFT_OUT + 2) * reporter.REPORT_SECONDS


async def test_a_report_of_nothing_new_asks_the_server_for_four_commands(redis: Redis) -> None:
    minutes: set[int] = set()
    while len(minutes) != 1:  # the first report of a minute renews what expires
        minutes.clear()
        now_ms, _ = await scripts.report(redis, "host:1:x", 1, b"line", b"running", {}, False)
        minutes.add(now_ms // 60_000)
        before = await new_calls(redis)
        now_ms, known = await scripts.report(redis, "host:1:x", 2, b"", b"", {}, False)
        minutes.add(now_ms // 60_000)
        asked = await new_calls(redis, before)
    assert known
    assert asked == {"info": 1, "evalsha": 1, "time": 1, "hmget": 1, "zadd": 1}
    assert await redis.zscore("diracx:monitor:reporting", "host:1:x") == now_ms
    await scripts.report(redis, "host:1:x", 3, b"", b"", {}, True)


async def test_what_a_report_lost_with_the_data_of_the_server_is_asked_for_again(redis: Redis) -> None:
    await scripts.report(redis, "host:1:x", 1, b"line", b"running", {}, False)
    await redis.flushall()
    assert (await scripts.report(redis, "host:1:x", 2, b"", b"", {}, False))[1] is False
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


async def waiting(redis: Redis) -> int:
    return sum(client["cmd"] == "xreadgroup" for client in await redis.client_list())


@pytest.mark.parametrize(("task", "most"), [(Rings, 9.5), (Takes, 13)])
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
                while await redis.xlen("diracx:tasks:normal:medium") or await waiting(redis) < 8:
                    await asyncio.sleep(0.005)

        await runs(9)  # the server knows all scripts from here on
        before = await new_calls(redis)
        await runs(20)
        asked = await new_calls(redis, before)
    ours = {name: calls for name, calls in asked.items() if name not in ("info", "xlen", "client|list")}
    assert sum(ours.values()) <= 20 * most, ours


async def test_an_idle_worker_has_three_connections_however_many_it_has_needed(
    redis_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One waits for messages, one renews the lease and listens to channels, one is for commands."""
    monkeypatch.setattr(reporter, "REPORT_SECONDS", 0.05)
    broker, stop = RedisStreamBroker(redis_url), asyncio.Event()
    before = len(await redis.client_list())
    worker = Worker(broker, TaskRegistry({}))
    running = asyncio.create_task(worker.run(stop))
    await worker.ready.wait()
    await asyncio.gather(*(broker.redis.ping() for _ in range(20)))
    async with asyncio.timeout(60):
        while len(await redis.client_list()) - before != 3 or not await waiting(redis):
            await asyncio.sleep(0.01)
    stop.set()
    await running
    await broker.shutdown()


async def test_looking_for_what_is_due_costs_two_commands_while_there_is_nothing(redis: Redis) -> None:
    await scripts.promote(redis, 500)  # the server knows the script from here on
    before = await new_calls(redis)
    assert await scripts.promote(redis, 500) == (0, None, 0, False)
    assert await new_calls(redis, before) == {"info": 1, "evalsha": 1, "exists": 1}
