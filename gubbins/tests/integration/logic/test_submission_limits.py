"""Limits of submissions: checked in the reservation, also for concurrent ones."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.pilot_requests import request_pilots

from gubbins.db.sql import MyPilotDB, MyPilotStatus
from gubbins.domain import clock
from gubbins.domain.exceptions import NoRoomError, PilotSubmissionError, SubmissionLimitError
from gubbins.logic import my_pilots as logic

VOS = ("lhcb", "dteam", "gridpp")
LIMITS = st.none() | st.integers(0, 4)


async def held(db: MyPilotDB, name: str = "ce") -> Counter[tuple[str, MyPilotStatus]]:
    slots: Counter[tuple[str, MyPilotStatus]] = Counter()
    for (ce, vo), states in (await db.count_slots()).items():
        if ce == name:
            slots.update({(vo, state): count for state, count in states.items()})
    return slots


@pytest.mark.timeout(300)
@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    capacity=st.integers(0, 6),
    shares=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    waiting=st.lists(LIMITS, min_size=3, max_size=3),
    per_cycle=LIMITS,
    rounds=st.booleans(),
)
async def test_no_rule_is_exceeded_by_concurrent_submissions(
    db: MyPilotDB,
    capacity: int,
    shares: list[int],
    waiting: list[int | None],
    per_cycle: int | None,
    rounds: bool,
) -> None:
    own = [{"share": share, "max_waiting": most} for share, most in zip(shares, waiting, strict=True)]
    name = f"ce{datetime.now(UTC).timestamp()}"
    rules = {"max_per_cycle": per_cycle, "vos": dict(zip(VOS, own, strict=True))}
    await db.add_ce(name, capacity, 1.0, vos=list(VOS), rules=rules)

    async def submit(vo: str) -> None:
        with contextlib.suppress(PilotSubmissionError):
            await logic.submit_pilot(db, name, vo)

    async def take_part_in_rounds(vo: str) -> None:
        requests = await logic.request_pilots(db, vo, vos=VOS, compute_elements=[name])
        for stamp in requests.get(name, ()):
            with contextlib.suppress(PilotSubmissionError):
                await logic.submit_requested_pilot(db, name, vo, stamp=stamp)

    async with asyncio.TaskGroup() as group:
        for vo in VOS:
            if rounds:
                group.create_task(take_part_in_rounds(vo))
            for _ in range(capacity + 1):
                group.create_task(submit(vo))

    slots = await held(db, name)
    assert slots.total() <= capacity
    for index, vo in enumerate(VOS):
        has = slots[vo, MyPilotStatus.SUBMITTED]
        if (most := waiting[index]) is not None:
            assert has <= most
        if per_cycle is not None and not rounds:
            assert has <= per_cycle
        # Slots that the others may not have by their rules are for any VO; a first round deals by what is free.
        if not rounds and waiting == [None] * 3:
            assert has < Fraction(capacity * shares[index], sum(shares)) + 1


async def test_one_vo_does_not_take_the_slots_of_another(db: MyPilotDB) -> None:
    await db.add_ce("ce", 8, 1.0, vos=["lhcb", "dteam"], rules={"vos": {"lhcb": {"share": 3}}})
    for vo, part in (("dteam", 2), ("lhcb", 6)):
        for _ in range(part):
            await logic.submit_pilot(db, "ce", vo)
        with pytest.raises((SubmissionLimitError, NoRoomError)) as refusal:
            await logic.submit_pilot(db, "ce", vo)
    assert isinstance(refusal.value, NoRoomError)


async def test_slots_that_no_other_vo_wants_are_free_for_all(db: MyPilotDB) -> None:
    await db.add_ce("ce", 4, 1.0, vos=["lhcb", "dteam"])
    # dteam requested pilots once, long ago, and none since.
    with clock.simulated(lambda: datetime.now(UTC) - timedelta(hours=1)):
        assert await request_pilots(db, "dteam", vos=["lhcb", "dteam"]) == {"ce": 2}
    for _ in range(4):
        await logic.submit_pilot(db, "ce", "lhcb")


async def test_slots_granted_to_another_vo_are_not_available(db: MyPilotDB) -> None:
    await db.add_ce("ce", 3, 1.0)
    stamps = (await logic.request_pilots(db, "dteam", vos=["dteam"]))["ce"]
    assert len(stamps) == 3
    with pytest.raises(NoRoomError, match="3 of them by requests of other VOs"):
        await logic.submit_pilot(db, "ce", "lhcb")
    pilots = {await logic.submit_requested_pilot(db, "ce", "dteam", stamp=stamp) for stamp in stamps}
    assert len(pilots - {None}) == 3
    assert await db.waiting_requests("ce", at_most=1) == []


@pytest.mark.parametrize("rule", ["max_waiting", "max_per_cycle"])
async def test_a_refusal_names_the_rule_and_its_value(db: MyPilotDB, rule: str) -> None:
    await db.add_ce("ce", 9, 1.0, rules={"vos": {"lhcb": {rule: 2}}})
    for _ in range(2):
        await logic.submit_pilot(db, "ce", "lhcb")
    with pytest.raises(SubmissionLimitError, match=f"its rule {rule} is 2, and 2 ") as refusal:
        await logic.submit_pilot(db, "ce", "lhcb")
    assert (refusal.value.retry_after_seconds is None) is (rule == "max_waiting")
    await logic.submit_pilot(db, "ce", "dteam")


async def test_pilots_that_ended_within_the_cycle_count_as_well(db: MyPilotDB) -> None:
    await db.add_ce("ce", 9, 1.0, rules={"max_per_cycle": 1})
    now: Any = datetime(2026, 1, 1, tzinfo=UTC)
    with clock.simulated(lambda: now):
        await logic.submit_pilot(db, "ce", "lhcb")
        for _ in range(2):
            await logic.transition_pilot_states(db, "lhcb")
        assert not await held(db)
        now += timedelta(seconds=59)
        with pytest.raises(SubmissionLimitError) as refusal:
            await logic.submit_pilot(db, "ce", "lhcb")
        assert refusal.value.retry_after_seconds == 1
        now += timedelta(seconds=1)
        await logic.submit_pilot(db, "ce", "lhcb")


async def test_a_refused_request_is_deleted_and_holds_no_slot(db: MyPilotDB) -> None:
    await db.add_ce("ce", 4, 1.0, rules={"max_waiting": 2})
    first, second = (await logic.request_pilots(db, "lhcb", vos=["lhcb"]))["ce"]
    await db.set_ce("ce", capacity=4, success_rate=1.0, rules={"max_waiting": 1})
    pilot_id = await logic.submit_requested_pilot(db, "ce", "lhcb", stamp=first)
    assert pilot_id == await logic.submit_requested_pilot(db, "ce", "lhcb", stamp=first)
    assert await logic.submit_requested_pilot(db, "ce", "lhcb", stamp=second) is None
    [third] = (await db.add_requests("lhcb", {"ce": 1}))["ce"]
    with pytest.raises(SubmissionLimitError):
        await logic.submit_requested_pilot(db, "ce", "lhcb", stamp=third)
    assert await db.waiting_requests("ce", at_most=9) == []


async def test_too_long_names_are_refused_and_truncated_in_the_message(
    db: MyPilotDB,
) -> None:
    await db.add_ce("ce", 4, 1.0)
    for ce_name, vo in (("ce", "x" * 40_000), ("ce", ""), ("x" * 40_000, "lhcb"), ("x" * 40_000, "x" * 40_000)):
        with pytest.raises(PilotSubmissionError) as refusal:
            await logic.submit_pilot(db, ce_name, vo)
        assert len(str(refusal.value)) < 500
    assert not await held(db)
