"""VOs that share compute elements, over a day that passes in seconds."""

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
from gubbins.domain.pilot_states import ACTIVE
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

    async def submit(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome]:
        self.calls.append([pilot.vo for pilot in pilots])
        return await super().submit(pilots)

    async def poll(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, Observation]:
        return {pilot.stamp: self._seen(pilot) for pilot in pilots}

    def _seen(self, pilot: PilotAtCE) -> Observation:
        minutes = MEAN_MINUTES[pilot.vo] * (0.5 + int(pilot.stamp[:4], 16) / 0xFFFF)
        runs = pilot.started_at is None or clock.now() - pilot.started_at < timedelta(minutes=minutes)
        return Observation(Observed.RUNNING if runs else Observed.DONE)


@pytest.fixture
async def db(install_backend: Any) -> AsyncIterator[MyPilotDB]:
    install_backend("varied", VariedBackend)
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
    capacities = {ce["name"]: ce["capacity"] for ce in await db.get_ces()}
    seen = []
    with clock.simulated(lambda: begin + passed):
        while passed < DAY:
            requests: list[tuple[str, str, str]] = []
            for vo in VOS:

                async def waiting(vo: str = vo, passed: timedelta = passed) -> int:
                    return jobs(vo, passed)

                asked = await logic.request_pilots(db, vo, vos=VOS, waiting_jobs=waiting)
                requests += [(ce, vo, stamp) for ce, stamps in asked.items() for stamp in stamps]
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
async def test_over_a_day_every_vo_gets_its_share_and_no_slot_stays_empty(db: MyPilotDB) -> None:
    await db.add_ce("large", 20, 1.0, backend="varied", rules={"vos": {"second": {"share": 2}}})
    # Fewer slots than VOs: they have to take turns.
    await db.add_ce("tiny", 2, 1.0, backend="varied")
    seen = await a_day(db, lambda vo, passed: 0)
    large, tiny = used(seen, "large"), used(seen, "tiny")
    assert large == pytest.approx({"first": 4, "second": 8, "third": 4, "fourth": 4}, rel=0.08)
    assert sum(large.values()) > 19.5
    assert sum(tiny.values()) > 1.95
    assert min(tiny.values()) > 0, "one VO never had a turn"
    # In turns, each VO gets as many pilots; those of some run longer.
    turns = {vo: slots / MEAN_MINUTES[vo] for vo, slots in tiny.items()}
    assert max(turns.values()) < 2 * min(turns.values())


@pytest.mark.timeout(400)
async def test_over_a_day_of_calls_for_all_vos_capacity_shares_and_states_hold(db: MyPilotDB) -> None:
    rules = {"max_batch": 7, "vos": {"second": {"share": 2}}}
    await db.add_ce("large", 20, 1.0, backend="varied", rules=rules)
    await db.add_ce("tiny", 2, 1.0, backend="varied")
    VariedBackend.calls.clear()
    seen = await a_day(db, lambda vo, passed: 0, combined=True)
    large, tiny = used(seen, "large"), used(seen, "tiny")
    assert large == pytest.approx({"first": 4, "second": 8, "third": 4, "fourth": 4}, rel=0.08)
    assert sum(large.values()) > 19.5
    assert sum(tiny.values()) > 1.95
    assert min(tiny.values()) > 0, "one VO never had a turn"
    assert await logic.count_illegal_histories(db) == 0
    assert max(len(vos) for vos in VariedBackend.calls) == 7
    assert any(len(set(vos)) > 1 for vos in VariedBackend.calls), "no call was for several VOs"


@pytest.mark.timeout(400)
async def test_slots_that_a_vo_has_no_jobs_for_are_used_by_others(db: MyPilotDB) -> None:
    rules = {"vos": {"fourth": {"policy": "waiting_jobs", "trickle": 0}}}
    await db.add_ce("ce", 20, 1.0, backend="varied", rules=rules)

    def jobs(vo: str, passed: timedelta) -> int:
        return 1000 if timedelta(hours=8) <= passed < timedelta(hours=16) else 0

    seen = await a_day(db, jobs)
    steps_of = timedelta(hours=1) // STEP
    night = used(seen[steps_of : 8 * steps_of], "ce")
    busy = used(seen[10 * steps_of : 16 * steps_of], "ce")
    evening = used(seen[19 * steps_of :], "ce")
    assert night == pytest.approx({"first": 20 / 3, "second": 20 / 3, "third": 20 / 3, "fourth": 0}, rel=0.1)
    assert busy == pytest.approx(dict.fromkeys(VOS, 5), rel=0.1)
    assert evening["fourth"] == 0
    assert sum(used(seen[steps_of:], "ce").values()) > 19.5
