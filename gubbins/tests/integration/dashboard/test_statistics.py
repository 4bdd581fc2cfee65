"""Charts and failure rates of pilots."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import insert

from gubbins.dashboard.read_models import PilotReadModels, PilotStatistics
from gubbins.db.sql import MyPilotDB, MyPilotStatus
from gubbins.db.sql.schema import Pilots
from gubbins.domain import clock
from gubbins.logic import my_pilots as logic

NOW = datetime(2030, 1, 2, 12, 0, 7, 123456, tzinfo=UTC)
DAY = timedelta(days=1)


def _pilot(ce: str, vo: str, status: str, *ago: timedelta | None) -> dict[str, Any]:
    """Make a pilot that was submitted, started and ended so long ago."""
    names = ("submitted_at", "started_at", "ended_at")
    times = {name: None if each is None else NOW - each for name, each in zip(names, ago, strict=True)}
    place = {"ce_name": ce, "vo": vo, "status": MyPilotStatus(status), "stamp": uuid.uuid4().hex}
    return {**place, **times, "last_update": NOW, "cancel_requested_at": None, "last_error": None}


async def _course(db: MyPilotDB, pilots: list[dict[str, Any]], vo: str | None) -> PilotStatistics:
    for name in {pilot["ce_name"] for pilot in pilots}:
        await db.add_ce(name, 100_000, 1.0)
    async with db:
        await db.conn.execute(insert(Pilots), pilots)
    store = PilotReadModels()
    store.use(db)
    with clock.simulated(lambda: NOW):
        return await store.statistics(vo)


def _series(statistics: PilotStatistics, chart: str) -> dict[str, list[int]]:
    return {each["label"]: each["values"] for each in statistics.charts[chart]["series"]}


async def test_a_site_with_long_pilots_has_the_correct_failure_rate_and_level(
    db: MyPilotDB,
) -> None:
    """500 pilots a day for three days; each starts at once, lives 24 h, and each 50th fails after 5 min."""
    step, life, short = DAY / 500, DAY, timedelta(minutes=5)
    pilots = []
    for number in range(1500):
        age = step * number + timedelta(seconds=1)
        fails = number % 50 == 0
        lifetime = short if fails else life
        status = ("FAILED" if fails else "DONE") if age >= lifetime else "RUNNING"
        ended = age - lifetime if age >= lifetime else None
        pilots.append(_pilot("ce", "lhcb", status, age, age, ended))
    statistics = await _course(db, pilots, None)
    rate = statistics.failure_rate("ce")
    assert rate is not None
    assert abs(rate - 0.02) < 0.001
    running = _series(statistics, "slots")["running"]
    assert len(running) == 96
    assert min(running) >= 488
    assert max(running) <= 493
    flow = {label: sum(values) for label, values in _series(statistics, "flow").items()}
    assert flow["submitted"] == 500
    assert flow["done"] + flow["failed"] == sum(statistics.ended["ce"].values())


async def test_levels_and_flows_are_counted_by_quarters_of_an_hour(db: MyPilotDB) -> None:
    minute = timedelta(minutes=1)
    cancelled = {"cancel_requested_at": NOW, "last_error": "cancelled"}
    pilots = [
        _pilot("ce1", "lhcb", "SUBMITTED", 5 * minute, None, None),
        _pilot("ce1", "lhcb", "RUNNING", 50 * minute, 35 * minute, None),
        _pilot("ce1", "lhcb", "FAILED", 50 * minute, 35 * minute, 20 * minute),
        _pilot("ce1", "lhcb", "DONE", 3000 * minute, 2900 * minute, 2800 * minute),
        _pilot("ce2", "lhcb", "DONE", 3000 * minute, 2900 * minute, 1439 * minute),
        _pilot("ce2", "lhcb", "FAILED", 3000 * minute, 2900 * minute, 1000 * minute) | cancelled,
        _pilot("ce2", "lhcb", "RUNNING", 1441 * minute, 1439 * minute, None),
        _pilot("ce2", "lhcb", "SUBMITTED", timedelta(seconds=-3), None, None),  # by a clock that is ahead
        _pilot("ce3", "gridpp", "FAILED", 50 * minute, 35 * minute, 20 * minute),
        _pilot("ce3", "gridpp", "RUNNING", 50 * minute, 35 * minute, None),
    ]
    statistics = await _course(db, pilots, "lhcb")
    slots, flow = _series(statistics, "slots"), _series(statistics, "flow")
    assert slots["running"][-4:] == [1, 3, 2, 2]
    assert slots["submitted"][-4:] == [2, 0, 0, 2]
    assert (slots["running"][0], slots["submitted"][0]) == (2, 0)
    assert flow["submitted"][-4:] == [2, 0, 0, 2]
    assert flow["failed"][-4:] == [0, 0, 1, 0]
    assert (flow["done"][0], sum(flow["done"]), sum(flow["submitted"])) == (1, 1, 4)
    assert statistics.ended == {"ce1": {"FAILED": 1}, "ce2": {"DONE": 1, "CANCELLED": 1}}
    assert [statistics.failure_rate(name) for name in ("ce1", "ce2", "ce3")] == [1.0, 0.0, None]
    times = statistics.charts["slots"]["t"]
    assert (times[-1], times[-1] - times[0]) == (int(NOW.timestamp()), 95 * 15 * 60)


async def test_statistics_of_no_pilots_are_empty(db: MyPilotDB) -> None:
    store = PilotReadModels()
    store.use(db)
    statistics = await store.statistics("lhcb")
    assert statistics.ended == {}
    assert sum(sum(values) for chart in ("slots", "flow") for values in _series(statistics, chart).values()) == 0
    assert await logic.count_ended_pilots(db, NOW) == {}
