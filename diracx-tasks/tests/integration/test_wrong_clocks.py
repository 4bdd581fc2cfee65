"""Hosts with wrong clocks, and a server whose clock was set back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any

import pytest
from diracx.tasks.plumbing import BaseTask, CronSchedule, ExponentialBackoff, IntervalSeconds, PeriodicBaseTask
from diracx.tasks.plumbing import retry_policies as policies
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.plumbing.exceptions import TaskRetryRequestedError
from diracx.tasks.plumbing.retry_policies import RetryPolicyBase
from diracx.tasks.plumbing.schedules import RRuleSchedule, TaskScheduleBase
from diracx.tasks.plumbing.worker import settlement
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from support.scheduled_tasks import STREAM, Hourly, scheduling
from support.waiting import until

DELAY_SECONDS = 100.0


class InNaiveUtc(RetryPolicyBase):
    """A policy of an extension, without time zones."""

    def schedule_retry(self, attempt: int, exception: Exception) -> datetime | None:
        return policies.datetime.now(UTC).replace(tzinfo=None) + timedelta(seconds=DELAY_SECONDS)


class Fails(BaseTask):
    retry_policy = ExponentialBackoff(base_delay_seconds=DELAY_SECONDS)

    async def execute(self) -> None:
        raise OSError("not yet")


class FailsNaively(Fails):
    retry_policy = InNaiveUtc()


class AsksForARetry(BaseTask):
    """Has no policy: it is tried again after a second."""

    async def execute(self) -> None:
        raise TaskRetryRequestedError("once more")


def set_clock(monkeypatch: pytest.MonkeyPatch, ahead_seconds: float) -> None:
    """Set the clock of the worker wrong, for policies and settlements."""

    class Wrong(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            return datetime.now(tz) + timedelta(seconds=ahead_seconds)

    for module in (policies, settlement):
        monkeypatch.setattr(module, "datetime", Wrong)


@pytest.mark.parametrize("ahead_seconds", [-600, 600])
@pytest.mark.parametrize(
    ("task", "seconds"), [(Fails, DELAY_SECONDS), (FailsNaively, DELAY_SECONDS), (AsksForARetry, 1.0)]
)
async def test_a_retry_waits_for_its_delay_by_the_servers_clock_whatever_the_workers_shows(
    redis_url: str,
    redis: Redis,
    monkeypatch: pytest.MonkeyPatch,
    task: type[BaseTask],
    seconds: float,
    ahead_seconds: float,
) -> None:
    set_clock(monkeypatch, ahead_seconds)
    async with TaskSystem([task], redis_url=redis_url, scheduler=False) as system:
        before, _ = await redis.time()
        await task().schedule()
        await system.drain()
        after, _ = await redis.time()
        [(_, due_ms)] = await redis.zrange(keys.DELAYED, 0, 0, withscores=True)
        assert before + seconds <= due_ms / 1000 + 0.01 <= after + 1.01 + seconds
        await redis.delete(keys.DELAYED, keys.DELAYED_DATA)


# --- the server's clock -------------------------------------------------------------------------------------

DAY_MS = 86_400_000


def periodic(name: str, schedule: TaskScheduleBase) -> type[PeriodicBaseTask]:
    async def execute(self: PeriodicBaseTask) -> None:
        pass

    return type(name, (PeriodicBaseTask,), {"default_schedule": schedule, "execute": execute})


EVERY_HOUR = periodic("EveryHour", IntervalSeconds(3600))
BY_CRON = periodic("ByCron", CronSchedule("*/10 * * * *", timezone="Europe/Zurich"))
EVERY_OTHER_DAY = periodic("EveryOtherDay", RRuleSchedule("FREQ=DAILY;INTERVAL=2"))
YEARLY = periodic("Yearly", CronSchedule("0 0 29 2 *"))
UNTIL_SOON = periodic(
    "UntilSoon", RRuleSchedule(f"FREQ=HOURLY;UNTIL={datetime.now(UTC) + timedelta(days=2):%Y%m%d}T000000Z")
)
SCHEDULES = [EVERY_HOUR, BY_CRON, EVERY_OTHER_DAY, YEARLY, UNTIL_SOON]


async def next_runs(redis: Redis) -> dict[str, int]:
    found = await redis.zrange(keys.NEXT_RUNS, 0, -1, withscores=True)
    return {name.decode().removeprefix("test:"): int(due) for name, due in found}


async def plan_by_a_clock_ahead(redis: Redis, ahead_ms: int) -> None:
    """The next runs as a leader leaves them whose server was so far ahead."""
    for task in SCHEDULES:
        rule = task.default_schedule
        seconds, _ = await redis.time()
        then = datetime.fromtimestamp(seconds + ahead_ms / 1000, UTC)
        try:
            due = rule.next_after(then)
        except ValueError:
            await redis.zrem(keys.NEXT_RUNS, f"test:{task.__name__}")
        else:
            await redis.zadd(keys.NEXT_RUNS, {f"test:{task.__name__}": int(due.timestamp() * 1000)})


async def planned_as_it_should_be(redis: Redis) -> bool:
    """True if each next run is the first occurrence after now."""
    seconds, _ = await redis.time()
    now, found = datetime.fromtimestamp(seconds, UTC), await next_runs(redis)
    for task in SCHEDULES:
        expected, due_ms = task.default_schedule.next_after(now), found.get(task.__name__)
        in_phase = isinstance(task.default_schedule, IntervalSeconds)
        if due_ms is None or due_ms > expected.timestamp() * 1000 + 1000:
            return False
        if not in_phase and due_ms / 1000 != expected.timestamp():
            return False
    return True


async def until_planned(redis: Redis) -> None:
    await until(lambda: planned_as_it_should_be(redis), seconds=30)


@pytest.mark.parametrize("ahead_ms", [DAY_MS, 3 * DAY_MS, 400 * DAY_MS])
async def test_after_the_servers_clock_was_set_back_schedules_continue_by_the_new_time(
    redis_url: str, redis: Redis, caplog: pytest.LogCaptureFixture, ahead_ms: int
) -> None:
    system = TaskSystem(SCHEDULES, redis_url=redis_url, workers=0)
    async with system:
        before = await next_runs(redis)
    await plan_by_a_clock_ahead(redis, ahead_ms)
    ahead = await next_runs(redis)
    async with TaskSystem(SCHEDULES, redis_url=redis_url, workers=0):
        await until_planned(redis)
        after = await next_runs(redis)
    assert (after["EveryHour"] - ahead["EveryHour"]) % 3600_000 == 0, "an interval keeps its phase"
    assert {name: after[name] for name in ("EveryOtherDay", "Yearly")} == {
        name: before[name] for name in ("EveryOtherDay", "Yearly")
    }, "a run that is far ahead by its rule stays, and INTERVAL counts from where it did"
    assert "clock was set back" in caplog.text


async def test_a_leader_detects_that_the_clock_of_the_server_was_set_back(redis_url: str, redis: Redis) -> None:
    async with TaskSystem(SCHEDULES, redis_url=redis_url, workers=0) as system:
        scheduler = system.running_scheduler
        assert scheduler is not None
        scheduler.clock.ahead += DAY_MS / 1000  # what it would believe, had it asked before the change
        await plan_by_a_clock_ahead(redis, DAY_MS)
        await until_planned(redis)


async def test_a_clock_that_is_set_back_by_seconds_runs_nothing_again(
    redis_url: str, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """The run that is planned follows one that, by the clock, is about to be due once more."""
    async with TaskSystem([EVERY_HOUR], redis_url=redis_url, workers=0):
        pass
    seconds, _ = await redis.time()
    planned = {"test:EveryHour": (seconds + 3605) * 1000}
    await redis.zadd(keys.NEXT_RUNS, planned)
    async with TaskSystem([EVERY_HOUR], redis_url=redis_url, workers=0):
        assert await next_runs(redis) == {"EveryHour": planned["test:EveryHour"]}
    assert "set back" not in caplog.text


@pytest.mark.leaves_keys(STREAM)
async def test_a_leader_whose_server_says_that_it_is_too_early_waits(redis_url: str, redis: Redis) -> None:
    async def scripts_called() -> int:
        return int((await redis.info("commandstats"))["cmdstat_evalsha"]["calls"])

    config = {"common": {"Hourly": {"periodic": {"interval_seconds": 3}}}}
    async with scheduling(redis_url, Hourly, config=config) as scheduler:
        before = await scripts_called()
        scheduler.clock.ahead += 5
        await redis.publish(keys.WAKE_SCHEDULER, "delayed")
        await until(lambda: redis.xlen(STREAM))
        assert await scripts_called() - before < 50
