"""Fair shares of VOs in a simulated day."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import pytest

from gubbins.ces import Observation, Observed, PilotAtCE, SubmitOutcome
from gubbins.ces.simulated import SimulatedBackend
from gubbins.db.sql import MyPilotDB
from gubbins.domain import clock
from gubbins.domain.pilot_states import ACTIVE, MyPilotStatus
from gubbins.logic import my_pilots as logic

#: Requests hold for longer: who asks in each step does not lose its place in line.
STEP = timedelta(minutes=14)
DAY = timedelta(hours=24)
VOS = ("first", "second", "third", "fourth")
MEAN_MINUTES = {"first": 25, "second": 45, "third": 90, "fourth": 60}


class VariedBackend(SimulatedBackend):
    """Pilots of each VO run for times of its own, so that slots become free one by one."""

    calls: ClassVar[list[list[str]]] = []
    """The VOs of the pilots of each call."""
    orders: ClassVar[dict[str, int]] = {}
    """By stamp, how many pilots came before it: run times depend on it, so that each day is the same."""

    async def submit(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome]:
        self.calls.append([pilot.vo for pilot in pilots])
        for pilot in pilots:
            self.orders.setdefault(pilot.stamp, len(self.orders))
        return await super().submit(pilots)

    async def poll(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, Observation]:
        return {pilot.stamp: self._seen(pilot) for pilot in pilots}

    def _seen(self, pilot: PilotAtCE) -> Observation:
        # Multiples of the golden ratio are spread evenly over 0 to 1.
        minutes = MEAN_MINUTES[pilot.vo] * (0.5 + self.orders[pilot.stamp] * 0.618034 % 1)
        runs = pilot.started_at is None or clock.now() - pilot.started_at < timedelta(minutes=minutes)
        return Observation(Observed.RUNNING if runs else Observed.DONE)


@pytest.fixture
async def db(install_backend: Any, inline_sqlite: None) -> AsyncIterator[MyPilotDB]:
    install_backend("varied", VariedBackend)
    VariedBackend.calls.clear()
    VariedBackend.orders.clear()
    database = MyPilotDB("sqlite+aiosqlite:///:memory:")
    async with database.engine_context():
        await database.create_tables()
        yield database


async def a_day(
    db: MyPilotDB, jobs: Callable[[str, timedelta], int], *, combined: bool = False
) -> list[Counter[tuple[str, str]]]:
    """Let all VOs submit and check for a day, always in the same order; slots by (CE, VO) after each step.

    With `combined`, all VOs ask before the first task comes, and it submits the pilots of all.
    """
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    passed = timedelta()
    capacities = {ce["name"]: ce["capacity"] for ce in await db.list_ces()}
    seen = []
    with clock.simulated(lambda: begin + passed):
        while passed < DAY:
            requests: list[tuple[str, str, str]] = []
            for vo in VOS:

                async def waiting(vo: str = vo, passed: timedelta = passed) -> int:
                    return jobs(vo, passed)

                requested_pilots = await logic.request_pilots(db, vo, vos=VOS, waiting_jobs=waiting)
                requests += [(ce, vo, stamp) for ce, stamps in requested_pilots.items() for stamp in stamps]
                if not combined or vo == VOS[-1]:
                    for ce, owner, stamp in requests:
                        await logic.submit_requested_pilot(db, ce, owner, stamp=stamp)
                    requests = []
            slots: Counter[tuple[str, str]] = Counter()
            for held_by, states in (await db.count_slots()).items():
                slots[held_by] = sum(states[status] for status in ACTIVE if status in states)
            for ce, capacity in capacities.items():
                assert sum(slots[ce, vo] for vo in VOS) <= capacity
            seen.append(slots)
            for vo in VOS:
                await logic.transition_pilot_states(db, vo)
            passed += STEP
    return seen


def used(seen: Sequence[Counter[tuple[str, str]]], ce: str) -> dict[str, float]:
    """The mean number of slots of each VO."""
    return {vo: sum(slots[ce, vo] for slots in seen) / len(seen) for vo in VOS}


@pytest.mark.timeout(400)
async def test_in_a_simulated_day_every_vo_gets_its_share_and_no_slot_is_idle(db: MyPilotDB) -> None:
    await db.add_ce("large", 10, 1.0, backend="varied", rules={"vos": {"second": {"share": 2}}})
    # Fewer slots than VOs: they have to take turns.
    await db.add_ce("tiny", 2, 1.0, backend="varied")
    seen = await a_day(db, lambda vo, passed: 0)
    large, tiny = used(seen, "large"), used(seen, "tiny")
    assert large == pytest.approx({"first": 2, "second": 4, "third": 2, "fourth": 2}, rel=0.08)
    assert sum(large.values()) > 9.7
    assert sum(tiny.values()) > 1.95
    assert min(tiny.values()) > 0, "one VO never had a turn"
    # In turns, each VO gets as many pilots; those of some run longer.
    ended = await db.get_pilots_by_status(MyPilotStatus.DONE, vo=None)
    turns = Counter(pilot["vo"] for pilot in ended if pilot["ce_name"] == "tiny")
    assert max(turns.values()) - min(turns.values()) <= 3, turns


@pytest.mark.timeout(400)
async def test_in_a_simulated_day_of_concurrent_calls_capacity_shares_and_states_are_valid(db: MyPilotDB) -> None:
    rules = {"max_batch": 5, "vos": {"second": {"share": 2}}}
    await db.add_ce("large", 10, 1.0, backend="varied", rules=rules)
    await db.add_ce("tiny", 2, 1.0, backend="varied")
    seen = await a_day(db, lambda vo, passed: 0, combined=True)
    large, tiny = used(seen, "large"), used(seen, "tiny")
    assert large == pytest.approx({"first": 2, "second": 4, "third": 2, "fourth": 2}, rel=0.08)
    assert sum(large.values()) > 9.7
    assert sum(tiny.values()) > 1.95
    assert min(tiny.values()) > 0, "one VO never had a turn"
    assert await logic.count_illegal_histories(db) == 0
    assert max(len(vos) for vos in VariedBackend.calls) == 5
    assert any(len(set(vos)) > 1 for vos in VariedBackend.calls), "no call was for several VOs"


@pytest.mark.timeout(400)
async def test_slots_without_jobs_of_a_vo_are_used_by_others(db: MyPilotDB) -> None:
    rules = {"vos": {"fourth": {"policy": "waiting_jobs", "trickle": 0}}}
    await db.add_ce("ce", 12, 1.0, backend="varied", rules=rules)

    def jobs(vo: str, passed: timedelta) -> int:
        return 1000 if timedelta(hours=8) <= passed < timedelta(hours=16) else 0

    seen = await a_day(db, jobs)
    steps_of = timedelta(hours=1) // STEP
    night = used(seen[steps_of : 8 * steps_of], "ce")
    busy = used(seen[10 * steps_of : 16 * steps_of], "ce")
    evening = used(seen[19 * steps_of :], "ce")
    assert night == pytest.approx({"first": 4, "second": 4, "third": 4, "fourth": 0}, rel=0.1)
    assert busy == pytest.approx(dict.fromkeys(VOS, 3), rel=0.1)
    assert evening["fourth"] == 0
    assert sum(used(seen[steps_of:], "ce").values()) > 11.7
