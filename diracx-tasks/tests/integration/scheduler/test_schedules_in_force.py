"""Schedules persist across changes of schedulers, configuration and tasks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from diracx.tasks.plumbing import (
    BaseTask,
    CronSchedule,
    IntervalSeconds,
    PeriodicBaseTask,
    RRuleSchedule,
    TasksConfig,
)
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.broker import scheduling as schedule_steps
from diracx.tasks.plumbing.broker.labels import LABEL_DUE
from diracx.tasks.plumbing.broker.models import TaskMessage
from diracx.tasks.plumbing.broker.requests import Occurrence
from diracx.tasks.plumbing.scheduler import TaskScheduler
from diracx.tasks.plumbing.scheduler.occurrences import iter_schedules
from diracx.tasks.plumbing.schedules import TaskScheduleBase
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from support.raised_exceptions import RAISED
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


@dataclass
class Of(PeriodicBaseTask):
    names: tuple[str, ...]
    times: int = 1
    default_schedule = IntervalSeconds(3600)

    async def execute(self) -> None: ...


# --- punctual -----------------------------------------------------------------------------------------------


@pytest.mark.leaves_keys(STREAM)
async def test_P15_a_thousand_schedules_due_at_one_instant_are_submitted_at_once(
    redis_url: str, redis: Redis
) -> None:
    vos = [f"vo{number}" for number in range(1000)]
    due = (int(time.time()) + 5) * 1000
    start = datetime.fromtimestamp(due / 1000, UTC)
    rule = f"DTSTART:{start:%Y%m%dT%H%M%SZ}\nRRULE:FREQ=DAILY"
    config = {"common": {"PerVo": {"periodic": {"rrule": rule}}}}
    async with scheduling(redis_url, PerVo, config=config, vos=vos):
        await until(lambda: redis.xlen(STREAM))
        await until(_has_length(redis, 1000))
    entries = await redis.xrange(STREAM)
    last_ms = int(entries[-1][0].split(b"-")[0])
    assert {TaskMessage.loadb(fields[b"data"]).labels[LABEL_DUE] for _, fields in entries} == {due}
    assert 0 <= last_ms - due < 10_000, "a busy machine included; `make bench` has the figures"


def _has_length(redis: Redis, length: int) -> Callable[[], Any]:
    async def check() -> bool:
        return await redis.xlen(STREAM) == length

    return check


async def test_P40_a_delayed_task_that_is_due_earlier_wakes_the_leader_without_polling(redis_url: str) -> None:
    class Now(BaseTask):
        async def execute(self) -> float:
            return time.time()

    settings = {"housekeeping_seconds": 20.0}
    async with TaskSystem([Now], redis_url=redis_url, scheduler=True, settings=settings) as system:
        late = []
        for _ in range(10):
            due = time.time() + 0.1
            task_id = await Now().schedule(at_time=datetime.fromtimestamp(due, UTC))
            late.append((await system.result(task_id)).return_value - due)
        # Several at a time, each due before the one that was put aside just before.
        for _ in range(10):
            dues = [time.time() + 0.1 - number / 100 for number in range(5)]
            moments = [datetime.fromtimestamp(due, UTC) for due in dues]
            ids = await asyncio.gather(*(Now().schedule(at_time=moment) for moment in moments))
            late += [(await system.result(id_)).return_value - due for id_, due in zip(ids, dues, strict=True)]
    assert min(late) >= 0, "never early"
    assert sorted(late)[len(late) // 2] < 0.5, "nor does it wait for the next renewal of the lease, seconds later"


# --- durable ------------------------------------------------------------------------------------------------


@pytest.mark.leaves_keys(STREAM)
async def test_P41_missed_occurrences_are_run_once_or_skipped_and_the_phase_is_kept(
    redis_url: str, redis: Redis
) -> None:
    async with scheduling(redis_url, Hourly, HourlyOrNot):
        pass
    missed = int(time.time() * 1000) - HOUR_MS * 7 // 2
    await redis.zadd(keys.NEXT_RUNS, {"test:Hourly": missed, "test:HourlyOrNot": missed})
    async with scheduling(redis_url, Hourly, HourlyOrNot):
        runs = await until(lambda: _all_in_the_future(redis))
    assert [(m.task_name, m.labels[LABEL_DUE]) for m in await submitted(redis)] == [("test:Hourly", missed)]
    assert {(due - missed) % HOUR_MS for due in runs.values()} == {0}
    assert {due - missed for due in runs.values()} == {4 * HOUR_MS}


async def _all_in_the_future(redis: Redis) -> dict[str, int] | None:
    runs = await next_runs(redis)
    return runs if min(runs.values()) > time.time() * 1000 else None


@pytest.mark.leaves_keys(STREAM)
async def test_P41_a_run_that_is_a_little_late_is_not_missed(redis_url: str, redis: Redis) -> None:
    async with scheduling(redis_url, HourlyOrNot):
        pass
    await redis.zadd(keys.NEXT_RUNS, {"test:HourlyOrNot": int(time.time() * 1000) - 5000})
    async with scheduling(redis_url, HourlyOrNot):
        await until(lambda: redis.xlen(STREAM))


@pytest.mark.leaves_keys(STREAM)
async def test_P44_a_rule_with_a_count_ends_once_and_is_shown_as_finished_after_a_restart(
    redis_url: str, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    class Twice(PeriodicBaseTask):
        default_schedule = IntervalSeconds(1)

        async def execute(self) -> None: ...

    start = datetime.now(UTC) - timedelta(seconds=3598)
    rule = f"DTSTART:{start:%Y%m%dT%H%M%SZ}\nRRULE:FREQ=HOURLY;COUNT=2"
    config = {"common": {"Twice": {"periodic": {"rrule": rule}}}}
    async with scheduling(redis_url, Twice, config=config):
        await until(lambda: redis.xlen(STREAM))
        await until(_is_empty(redis))
    for _ in range(2):
        caplog.clear()
        async with scheduling(redis_url, Twice, config=config):
            state = (await look(redis, Twice, config=config))["test:Twice"]
            assert (state.state, state.next_run) == ("finished", None)
        assert await redis.xlen(STREAM) == 1
        assert not [record for record in caplog.records if record.levelname == "ERROR"]


def _is_empty(redis: Redis) -> Callable[[], Any]:
    async def check() -> bool:
        return not await redis.exists(keys.NEXT_RUNS)

    return check


async def test_P44_a_rule_that_ended_in_the_past_is_finished_and_others_run(
    redis_url: str, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    class Over(PeriodicBaseTask):
        default_schedule = RRuleSchedule("FREQ=DAILY;UNTIL=20200101T000000Z")

        async def execute(self) -> None: ...

    async with scheduling(redis_url, Over, Hourly):
        found = await look(redis, Over, Hourly)
    assert {id_: str(state.state) for id_, state in found.items()} == {
        "test:Over": "finished",
        "test:Hourly": "active",
    }
    assert "test:Over has no run left" in caplog.text


def test_a_day_with_23_or_25_hours_has_its_run_once() -> None:
    class Nightly(PeriodicBaseTask):
        default_schedule = CronSchedule("30 2 * * *", timezone="Europe/Zurich")

        async def execute(self) -> None: ...

    [scheduled] = iter_schedules(named(Nightly), TasksConfig(), [])
    for first, days in ((datetime(2027, 3, 26, tzinfo=UTC), 5), (datetime(2027, 10, 29, tzinfo=UTC), 5)):
        due_ms, seen = int(first.timestamp() * 1000), []
        for _ in range(days):
            occurrence: Occurrence = {"id": scheduled.id, "due": due_ms}
            scheduled.set_next(occurrence, due_ms)
            due_ms = occurrence["next"]
            seen.append(datetime.fromtimestamp(due_ms / 1000, UTC).date())
        assert len(set(seen)) == days
        assert seen[-1] - seen[0] == timedelta(days=days - 1)


# --- fenced -------------------------------------------------------------------------------------------------


async def test_an_occurrence_is_submitted_by_the_leader_when_it_is_due_and_once(redis: Redis) -> None:
    now = int(time.time() * 1000)
    dues = {"due": now - 1, "other": now - 1, "early": now + 60_000, "paused": now - 1, "skipped": now - 1}
    await redis.zadd(keys.NEXT_RUNS, dues)
    await schedule_steps.pause(redis, ["paused"], True)
    parts = {"stream": STREAM, "task": "t", "data": b"x", "next": now + HOUR_MS}
    batch = [{"id": id_, "due": due, **parts} for id_, due in dues.items()]
    batch[1]["due"] += 1
    for part in ("stream", "task", "data"):
        del batch[4][part]
    try:
        assert await schedule_steps.occur(redis, "old", batch) is None, "no scheduler leads"
        await redis.set(keys.LEADER, "new")
        assert await schedule_steps.occur(redis, "old", batch) is None, "another scheduler leads"
        assert await schedule_steps.occur(redis, "new", batch) == [1, 0, 3, 4, 5]
        assert await schedule_steps.occur(redis, "new", batch) == [0, 0, 3, 4, 0], (
            "a call whose reply was lost is repeated"
        )
        assert await redis.xlen(STREAM) == 1
        assert await redis.zscore(keys.NEXT_RUNS, "paused") == dues["paused"]
        assert await schedule_steps.plan(redis, "old", [{"id": "paused", "forgotten": 1}]) is False
        assert await redis.zcard(keys.NEXT_RUNS) == 5
    finally:
        await redis.delete(keys.LEADER, STREAM)


async def test_a_stream_that_refuses_an_occurrence_holds_up_no_other(redis: Redis) -> None:
    now = int(time.time() * 1000)
    await redis.zadd(keys.NEXT_RUNS, {"a": now - 1, "b": now - 1})
    await redis.set("diracx:tasks:normal:large", "no stream", px=60_000)
    await redis.set(keys.LEADER, "me", px=60_000)
    parts = {"due": now - 1, "task": "t", "data": b"x", "next": now + HOUR_MS}
    batch = [{"id": "a", "stream": "diracx:tasks:normal:large", **parts}, {"id": "b", "stream": STREAM, **parts}]
    assert await schedule_steps.occur(redis, "me", batch) == [6, 1]
    assert await next_runs(redis) == {"a": now - 1, "b": now + HOUR_MS}
    await redis.delete(STREAM, "diracx:tasks:normal:large")


# --- following the configuration ----------------------------------------------------------------------------


@pytest.mark.leaves_keys(STREAM)
async def test_P43_reconfigure_adds_drops_and_keeps_schedules_promptly(redis_url: str, redis: Redis) -> None:
    async with scheduling(redis_url, PerVo, Hourly, vos=["lhcb", "cta"]) as scheduler:
        before = await next_runs(redis)
        assert sorted(before) == ["test:Hourly", "test:PerVo/cta", "test:PerVo/lhcb"]
        config = {"common": {"Hourly": {"periodic": {"interval_seconds": 7200}}}}
        scheduler.reconfigure(TasksConfig.model_validate(config), ["lhcb", "gridpp"])
        after = await until(lambda: _planned(redis, "test:PerVo/gridpp"))
        assert sorted(after) == ["test:Hourly", "test:PerVo/gridpp", "test:PerVo/lhcb"]
        assert after["test:PerVo/lhcb"] == before["test:PerVo/lhcb"], "what is unchanged keeps its next run"
        assert after["test:Hourly"] > before["test:Hourly"] + HOUR_MS // 2
        scheduler.reconfigure(TasksConfig.model_validate({"common": {"Hourly": {"enabled": False}}}), [])
        await until(_is_empty(redis))


async def _planned(redis: Redis, schedule: str) -> dict[str, int] | None:
    runs = await next_runs(redis)
    return runs if schedule in runs else None


@pytest.mark.leaves_keys(STREAM)
async def test_schedules_too_frequent_for_the_server_hold_up_neither_the_configuration_nor_the_stop(
    redis_url: str, redis: Redis
) -> None:
    too_often = {"common": {"PerVo": {"periodic": {"interval_seconds": 0.001}}}}
    vos = [f"vo{number}" for number in range(500)]
    async with scheduling(redis_url, PerVo, config=too_often, vos=vos) as scheduler:
        await until(lambda: redis.xlen(STREAM))
        scheduler.reconfigure(TasksConfig(), vos)
        await until(_are_hourly(redis, len(vos)))
        scheduler.reconfigure(TasksConfig.model_validate(too_often), vos)
        await until(_are_not_hourly(redis))


def _are_hourly(redis: Redis, number: int) -> Callable[[], Any]:
    async def check() -> bool:
        runs = await next_runs(redis)
        return len(runs) == number and min(runs.values()) > time.time() * 1000 + HOUR_MS / 2

    return check


def _are_not_hourly(redis: Redis) -> Callable[[], Any]:
    async def check() -> bool:
        return max((await next_runs(redis)).values()) < time.time() * 1000 + HOUR_MS / 2

    return check


async def test_P43_a_standby_becomes_leader_with_its_current_configuration(redis_url: str, redis: Redis) -> None:
    second_broker = RedisStreamBroker(redis_url)
    second, stop = TaskScheduler(second_broker, named(Hourly, PerVo)), asyncio.Event()
    async with scheduling(redis_url, Hourly, lease_seconds=600):
        running = asyncio.create_task(second.run(stop))
        await second.ready.wait()
        second.reconfigure(TasksConfig(), ["lhcb"])
        assert sorted(await next_runs(redis)) == ["test:Hourly"]
    # A lead that is given up is taken at once, not when its lease would have ended.
    await asyncio.wait_for(second.leads.wait(), 30)
    assert sorted(await next_runs(redis)) == ["test:Hourly", "test:PerVo/lhcb"]
    stop.set()
    await running
    await second_broker.shutdown()


@pytest.mark.leaves_keys(STREAM)
async def test_P45_an_occurrence_that_could_not_be_submitted_is_shown_and_retried(
    redis_url: str, redis: Redis
) -> None:
    config = {
        "common": {"Of": {"instances": {"a": {"args": {"nams": ["x"]}}}, "periodic": {"interval_seconds": 0.05}}}
    }
    good = {
        "common": {"Of": {"instances": {"a": {"args": {"names": ["x"]}}}, "periodic": {"interval_seconds": 0.05}}}
    }
    async with scheduling(redis_url, Of, Hourly, config=config) as scheduler:
        await until(lambda: redis.exists(keys.PROBLEMS))
        state = (await look(redis, Of, config=config))["test:Of@a"]
        assert state.state == "failing"
        assert "nams" in (state.problem or "")
        assert await redis.zscore(keys.NEXT_RUNS, "test:Of@a"), "its occurrence is not lost"
        scheduler.reconfigure(TasksConfig.model_validate(good), [])
        await until(lambda: redis.xlen(STREAM))
        await until(lambda: _is_gone(redis, keys.PROBLEMS))


async def _is_gone(redis: Redis, key: str) -> bool:
    return not await redis.exists(key)


PLACES = ("fingerprint", "first run", "later run", "constructor")


def raising(what: str, where: str) -> type[PeriodicBaseTask]:
    """A class that raises in one of the places where the scheduler runs code of its author."""

    def raise_at(place: str) -> None:
        if place == where:
            raise RAISED[what]()

    class Rule(TaskScheduleBase):
        runs = 0

        @property
        def fingerprint(self) -> str:
            raise_at("fingerprint")
            return "now"

        def next_occurrence(self) -> datetime:
            self.runs += 1
            raise_at("first run" if self.runs == 1 else "later run")
            return datetime.now(UTC)

    class Lost(PeriodicBaseTask):
        default_schedule = Rule()

        def __init__(self) -> None:
            raise_at("constructor")

        async def execute(self) -> None: ...

    return type(f"Lost{list(RAISED).index(what)}_{PLACES.index(where)}", (Lost,), {})


def expected_state(what: str, where: str) -> str:
    """A `ValueError` of a rule means that it has no further run."""
    return "finished" if where.endswith("run") and issubclass(type(RAISED[what]()), ValueError) else "failing"


@pytest.mark.leaves_keys(STREAM)
async def test_P44_code_of_users_that_raises_anything_is_shown_and_does_not_affect_others(
    redis_url: str, redis: Redis
) -> None:
    lost = {raising(what, where): expected_state(what, where) for what in RAISED for where in PLACES}
    failing = list(lost.values()).count("failing")
    async with scheduling(redis_url, *lost, Hourly):
        await until(lambda: _has(redis, keys.PROBLEMS, failing))
        found = await look(redis, *lost, Hourly)
    assert {each: str(found[f"test:{each.__name__}"].state) for each in lost} == lost
    assert found["test:Hourly"].state == "active"
    assert found["test:Lost0_0"].problem == "Panic: "


async def _has(redis: Redis, key: str, number: int) -> bool:
    return await redis.hlen(key) == number


async def test_instances_have_ids_arguments_and_schedules_of_their_own(redis_url: str, redis: Redis) -> None:
    config = {
        "common": {
            "Of": {
                "periodic": {"interval_seconds": 7200},
                "instances": {
                    "fast": {
                        "args": {"names": ["a", "b"]},
                        "periodic": {"schedule": "0 */2 * * *", "missed": "skip"},
                    },
                    "rest": {"args": {"names": [], "times": 3}},
                    "off": {"enabled": False, "args": {"names": []}},
                },
            },
            "Hourly": {"periodic": {"enabled": False}},
        },
        "vo_overrides": {"cta": {"PerVo": {"instances": {"x": {}}}}},
    }
    tasks_config = TasksConfig.model_validate(config)
    found = {
        each.id: each
        for each in iter_schedules(named(Of, Hourly, PerVo), tasks_config, ["lhcb", "cta"])
        if each.enabled
    }
    assert sorted(found) == ["test:Of@fast", "test:Of@rest", "test:PerVo/lhcb", "test:PerVo@x/cta"]
    assert found["test:Of@fast"].build() == Of(("a", "b"))
    assert found["test:Of@rest"].build() == Of((), 3)
    assert found["test:PerVo@x/cta"].build().vo == "cta"  # type: ignore[attr-defined]
    shown = await look(redis, Of, Hourly, PerVo, config=config, vos=["lhcb", "cta"])
    assert {id_: (str(s.state), s.source, s.rule) for id_, s in shown.items()} == {
        "test:Hourly": ("disabled", "common", "every 3600 s"),
        "test:Of@fast": ("unplanned", "common", "cron 0 */2 * * *"),
        "test:Of@off": ("disabled", "common", "every 7200 s"),
        "test:Of@rest": ("unplanned", "common", "every 7200 s"),
        "test:PerVo/lhcb": ("unplanned", "code", "every 3600 s"),
        "test:PerVo@x/cta": ("unplanned", "code", "every 3600 s"),
    }
    assert (shown["test:Of@fast"].missed, shown["test:Of@rest"].missed) == ("skip", "once")
