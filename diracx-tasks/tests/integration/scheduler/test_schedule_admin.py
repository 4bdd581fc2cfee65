"""Administration of schedules: pause, run now, outcomes, deletion."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import pytest
from diracx.tasks.plumbing import (
    BaseTask,
    ExponentialBackoff,
    IntervalSeconds,
    PeriodicBaseTask,
    TasksConfig,
)
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.broker.labels import LABEL_SCHEDULE
from diracx.tasks.plumbing.broker.scheduling import pause
from diracx.tasks.plumbing.registry import TaskRegistry
from diracx.tasks.plumbing.scheduler import ScheduleState, admin
from diracx.tasks.plumbing.scheduler.occurrences import iter_schedules
from diracx.tasks.plumbing.submission.client import Binding
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from support.scheduled_tasks import (
    HOUR_MS,
    STREAM,
    Hourly,
    HourlyOrNot,
    PerVo,
    look,
    named,
    next_runs,
    scheduling,
    submitted,
)
from support.waiting import until


class Often(PeriodicBaseTask):
    default_schedule = IntervalSeconds(0.05)

    async def execute(self) -> None: ...


# --- by hand, and what is seen ------------------------------------------------------------------------------


@pytest.mark.leaves_keys(STREAM)
async def test_a_paused_schedule_submits_nothing_and_one_missed_run_when_it_is_resumed(
    redis_url: str, redis: Redis
) -> None:
    ids = ["test:Hourly", "test:HourlyOrNot"]
    await pause(redis, ids, True)
    async with scheduling(redis_url, Hourly, HourlyOrNot):
        pass
    missed = int(time.time() * 1000) - HOUR_MS * 5 // 2
    await redis.zadd(keys.NEXT_RUNS, dict.fromkeys(ids, missed))
    async with scheduling(redis_url, Hourly, HourlyOrNot, Often):
        await until(lambda: redis.xlen(STREAM))  # of Often: the leader has looked at what is due
        assert {m.task_name for m in await submitted(redis)} == {"test:Often"}
        assert await pause(redis, ids, False) == ids
        runs = await until(lambda: _passed(redis, ids, missed))
        assert [m.task_name for m in await submitted(redis) if m.task_name != "test:Often"] == ["test:Hourly"]
        assert {runs[id_] - missed for id_ in ids} == {3 * HOUR_MS}, "both keep their phase"


async def _passed(redis: Redis, ids: Iterable[str], missed: int) -> dict[str, int] | None:
    runs = await next_runs(redis)
    return None if missed in [runs[id_] for id_ in ids] else runs


async def test_a_pause_is_kept_by_a_scheduler_without_the_task(redis_url: str, redis: Redis) -> None:
    await pause(redis, ["test:Hourly"], True)
    async with scheduling(redis_url, PerVo):
        pass
    assert (await look(redis, Hourly))["test:Hourly"].state == "paused"
    assert (await look(redis, PerVo))["test:Hourly"].state == "unknown"
    assert await pause(redis, ["test:Hourly"], False) == ["test:Hourly"]


@pytest.mark.leaves_keys(STREAM)
async def test_run_now_does_not_wait_and_never_accumulates_tasks(redis_url: str, redis: Redis) -> None:
    broker = RedisStreamBroker(redis_url)
    registry = TaskRegistry.of(named(Hourly))
    [scheduled] = iter_schedules(registry, TasksConfig(), [])
    first = await admin.run_now(Binding(broker, registry), scheduled)
    with pytest.raises(admin.AlreadyQueuedError) as refused:
        await admin.run_now(Binding(broker, registry), scheduled)
    [message] = await submitted(redis)
    assert refused.value.task_id == message.task_id == first
    assert message.labels == {LABEL_SCHEDULE: "test:Hourly"}
    assert (await look(redis, Hourly))["test:Hourly"].activity == "waiting"
    await broker.shutdown()


async def test_the_outcome_of_an_occurrence_is_kept_and_of_nothing_else(redis_url: str, redis: Redis) -> None:
    class Fails(Hourly):
        async def execute(self) -> None:
            raise ValueError("out of luck")

    class FailsAgain(Fails):
        retry_policy: ClassVar[Any] = ExponentialBackoff(base_delay_seconds=3600, max_retries=1)

    class Sleeps(Hourly):
        async def execute(self) -> None:
            await asyncio.sleep(3600)

    tasks = (Hourly, Fails, FailsAgain, Sleeps)
    async with TaskSystem(tasks, redis_url=redis_url) as system:
        await Hourly().schedule()
        ids = {}
        for scheduled in iter_schedules(system.registry, TasksConfig(), []):
            ids[scheduled.id] = await admin.run_now(Binding(system.broker, system.registry), scheduled)
        found = await until(lambda: _with_outcomes(redis, tasks, 3))
        assert found["test:Hourly"].outcome.ok
        failed = found["test:Fails"].outcome
        assert (failed.ok, failed.error, failed.message) == (False, "ValueError", "out of luck")
        assert (failed.task_id, failed.retry_at, found["test:Fails"].activity) == (ids["test:Fails"], None, None)
        assert found["test:FailsAgain"].activity == "retrying"
        assert found["test:FailsAgain"].outcome.retry_at > datetime.now(UTC) + timedelta(minutes=50)
        assert (found["test:Sleeps"].outcome, found["test:Sleeps"].activity) == (None, "running")
        await system.cancel(ids["test:Sleeps"])
        await system.cancel(ids["test:FailsAgain"])
        found = await until(lambda: _with_outcomes(redis, tasks, 4))
        assert {found[id_].outcome.error for id_ in ("test:Sleeps", "test:FailsAgain")} == {"TaskCancelledError"}
        assert found["test:FailsAgain"].activity is None
        await system.drain()


async def _with_outcomes(
    redis: Redis, tasks: Iterable[type[BaseTask]], number: int
) -> dict[str, ScheduleState] | None:
    found = await look(redis, *tasks)
    return found if sum(state.outcome is not None for state in found.values()) == number else None


async def test_a_deleted_schedule_leaves_no_keys(redis_url: str, redis: Redis) -> None:
    async with TaskSystem([Often], redis_url=redis_url):
        await until(lambda: redis.hexists(keys.OUTCOMES, "test:Often"))
    async with scheduling(redis_url, Often, config={"common": {"Often": {"enabled": False}}}):
        state = (await look(redis, Often, config={"common": {"Often": {"enabled": False}}}))["test:Often"]
        assert state.state == "disabled"
        assert state.outcome is not None, "what is switched off keeps its history"
    async with scheduling(redis_url, Hourly):
        pass
    assert await redis.keys("diracx:scheduler:*") != []
    for key in (keys.LAST_RUNS, keys.OUTCOMES, keys.PROBLEMS, keys.PAUSED):
        assert not await redis.exists(key), key
