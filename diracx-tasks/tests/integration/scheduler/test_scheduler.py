"""Periodic and delayed tasks, and leader election."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from diracx.tasks.plumbing import (
    BaseTask,
    IntervalSeconds,
    PeriodicBaseTask,
    PeriodicVoAwareBaseTask,
    RateLimiter,
)
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.plumbing.scheduler import TaskScheduler
from diracx.tasks.plumbing.schedules import TaskScheduleBase
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from support.standard_tasks import SEEN
from support.waiting import until

pytestmark = pytest.mark.event_loops("asyncio", "uvloop")


class Often(PeriodicBaseTask):
    default_schedule = IntervalSeconds(0.1)

    async def execute(self) -> None:
        SEEN.append(time.monotonic())


class OfEachVO(PeriodicVoAwareBaseTask):
    default_schedule = IntervalSeconds(0.1)

    async def execute(self) -> None:
        SEEN.append(self.vo)


class Off(PeriodicBaseTask):
    default_schedule = IntervalSeconds(0.05)
    _enabled = False

    async def execute(self) -> None:
        SEEN.append("off")


async def test_P40_an_interval_keeps_its_period_and_its_phase(redis_url: str) -> None:
    async with TaskSystem([Often, Off], redis_url=redis_url, scheduler=True):
        await until(lambda: len(SEEN) >= 11)
    elapsed = SEEN[10] - SEEN[0]
    assert 0.8 < elapsed < 5, "ten periods of 0.1 s, on a machine that may be busy"
    assert "off" not in SEEN


async def test_vo_aware_tasks_run_once_for_each_vo(redis_url: str) -> None:
    async with TaskSystem([OfEachVO], redis_url=redis_url, scheduler=True, vos=["lhcb", "cta"]):
        await until(lambda: {"lhcb", "cta"} <= set(SEEN))
    assert set(SEEN) == {"lhcb", "cta"}


async def test_operator_sets_schedules_and_switches_without_code(redis_url: str) -> None:
    config = {
        "common": {
            "test:Often": {"enabled": False},
            "test:OfEachVO": {"periodic": {"interval_seconds": 0.05}},
        },
        "vo_overrides": {"cta": {"test:OfEachVO": {"periodic": {"enabled": False}}}},
    }
    async with TaskSystem(
        [Often, OfEachVO], redis_url=redis_url, scheduler=True, vos=["lhcb", "cta"], config=config
    ):
        await until(lambda: len(SEEN) >= 5)
    assert set(SEEN) == {"lhcb"}


async def test_P41_a_restart_keeps_next_runs_and_runs_a_missed_one_once(redis_url: str, redis: Redis) -> None:
    class Rarely(PeriodicBaseTask):
        default_schedule = IntervalSeconds(3600)

        async def execute(self) -> None:
            SEEN.append("ran")

    async with TaskSystem([Rarely], redis_url=redis_url, workers=0, scheduler=True):
        assert await redis.zcard(keys.NEXT_RUNS) == 1
    # It is three and a half periods later.
    missed = int(time.time() * 1000) - 3600_000 * 7 // 2
    await redis.zadd(keys.NEXT_RUNS, {"test:Rarely": missed})
    async with TaskSystem([Rarely], redis_url=redis_url, scheduler=True) as system:
        await until(lambda: SEEN)
        await system.drain()
        [(_, following)] = await redis.zrange(keys.NEXT_RUNS, 0, 0, withscores=True)
    assert SEEN == ["ran"], "one late run for any number of missed ones"
    assert (following - missed) % 3600_000 == 0, "and the phase is kept"


async def test_a_changed_schedule_takes_effect_at_the_next_start(redis_url: str, redis: Redis) -> None:
    class Rarely(PeriodicBaseTask):
        default_schedule = IntervalSeconds(3600)

        async def execute(self) -> None:
            SEEN.append("ran")

    async with TaskSystem([Rarely], redis_url=redis_url, workers=0, scheduler=True):
        pass
    config = {"common": {"test:Rarely": {"periodic": {"interval_seconds": 0.05}}}}
    async with TaskSystem([Rarely], redis_url=redis_url, scheduler=True, config=config):
        await until(lambda: SEEN)
    async with TaskSystem([Often], redis_url=redis_url, workers=0, scheduler=True):
        assert await redis.zrange(keys.NEXT_RUNS, 0, -1) == [b"test:Often"], "what is gone is forgotten"
    await redis.delete("diracx:tasks:normal:medium")  # where an occurrence may wait, without a worker


async def test_P45_occurrences_do_not_pile_up_without_workers(redis_url: str, redis: Redis) -> None:
    stream = "diracx:tasks:normal:medium"
    async with TaskSystem([Often], redis_url=redis_url, workers=0, scheduler=True):
        runs = set()

        async def five_came_and_went() -> bool:
            runs.update(score for _, score in await redis.zrange(keys.NEXT_RUNS, 0, 0, withscores=True))
            return len(runs) >= 5

        await until(five_came_and_went, "five occurrences came and went")
        assert await redis.xlen(stream) == 1
    await redis.delete(stream)


async def test_P44_an_exhausted_rule_stops_without_affecting_others(redis_url: str) -> None:
    class Once(TaskScheduleBase):
        fingerprint = "once"

        def next_occurrence(self) -> datetime:
            return datetime.now(UTC) + timedelta(milliseconds=50)

        def next_after(self, moment: datetime) -> datetime:
            if hasattr(self, "asked"):
                raise ValueError("no more")
            self.asked = True
            return moment + timedelta(milliseconds=50)

    class Last(PeriodicBaseTask):
        default_schedule = Once()

        async def execute(self) -> None:
            SEEN.append("last")

    async with TaskSystem([Last, Often], redis_url=redis_url, scheduler=True):
        await until(lambda: len(SEEN) >= 8)
    assert SEEN.count("last") == 1


async def test_a_periodic_task_that_cannot_be_submitted_does_not_affect_others(redis_url: str) -> None:
    class Never(RateLimiter):
        limit = 1
        window_seconds = 1.0

    class Greedy(PeriodicBaseTask):
        default_schedule = IntervalSeconds(0.05)

        @property
        def execution_locks(self) -> list[BaseLock]:
            return [Never(JOB, 1, n_items=2)]

    @dataclass
    class WantsMore(PeriodicBaseTask):
        more: int

        default_schedule = IntervalSeconds(0.05)

    async with TaskSystem([Greedy, WantsMore, Often], redis_url=redis_url, scheduler=True):
        await until(lambda: len(SEEN) >= 3)


async def test_only_one_leads_and_a_standby_takes_over(redis_url: str, redis: Redis) -> None:
    stops = [asyncio.Event(), asyncio.Event()]
    brokers = [RedisStreamBroker(redis_url) for _ in stops]
    schedulers = [TaskScheduler(broker, {"test:Often": Often}, lease_seconds=600) for broker in brokers]
    running = [asyncio.create_task(scheduler.run(stop)) for scheduler, stop in zip(schedulers, stops, strict=True)]
    await until(lambda: any(scheduler.leads.is_set() for scheduler in schedulers))
    first, second = sorted(range(2), key=lambda index: not schedulers[index].leads.is_set())
    assert not schedulers[second].leads.is_set()
    stops[first].set()
    await running[first]
    await asyncio.wait_for(schedulers[second].leads.wait(), 30)  # long before the lease would have ended
    stops[second].set()
    await running[second]
    for broker in brokers:
        await broker.shutdown()
    assert not await redis.exists(keys.LEADER)
    await redis.delete("diracx:tasks:normal:medium")


async def test_an_earlier_delayed_task_wakes_the_sleeping_leader(redis_url: str) -> None:
    class Now(BaseTask):
        async def execute(self) -> datetime:
            return datetime.now(UTC)

    settings = {"housekeeping_seconds": 3600}
    async with TaskSystem([Now], redis_url=redis_url, scheduler=True, settings=settings) as system:
        due = datetime.now(UTC) + timedelta(seconds=0.2)
        await Now().schedule(at_time=due + timedelta(hours=1))
        result = await system.result(await Now().schedule(at_time=due))
        assert due <= result.return_value < due + timedelta(seconds=1)
        await system.broker.redis.delete(keys.DELAYED, keys.DELAYED_DATA)
