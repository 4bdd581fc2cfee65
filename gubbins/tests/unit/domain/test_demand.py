"""Fair shares."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from gubbins.domain.demand import UNLIMITED, Sharer, apportion, fair_part

MANY = 10**6
T0 = datetime(2026, 1, 1, tzinfo=UTC)


def test_a_single_vo_gets_all_its_demand() -> None:
    assert fair_part(7, "a", {"a": Sharer(1, 3, MANY)}) == 7
    assert fair_part(7, "a", {"a": Sharer(1, 3, 2)}) == 2
    assert fair_part(-1, "a", {"a": Sharer(1, 3, 2)}) == 0


def test_a_vo_above_its_share_gets_slots_that_others_leave() -> None:
    sharers = {"a": Sharer(1, 15, MANY), "b": Sharer(1, 4, MANY)}
    assert fair_part(1, "a", sharers) == 0
    assert fair_part(1, "b", sharers) == 1
    assert fair_part(5, "a", {**sharers, "b": Sharer(1, 4, 2)}) == 3


def test_shares_of_vos_are_relative_to_each_other() -> None:
    sharers = {"a": Sharer(3, 0, MANY), "b": Sharer(1, 0, MANY)}
    assert [fair_part(20, vo, sharers) for vo in sharers] == [15, 5]
    assert [fair_part(20, vo, {**sharers, "c": Sharer(1, 0, 0)}) for vo in sharers] == [15, 5]


def test_among_equals_the_longest_waiting_comes_first() -> None:
    sharers = {
        "a": Sharer(1, 0, MANY, T0),
        "b": Sharer(1, 0, MANY, T0 - timedelta(hours=1)),
        "c": Sharer(1, 0, MANY),
    }
    assert {vo: fair_part(1, vo, sharers) for vo in sharers} == {"a": 0, "b": 0, "c": 1}
    assert {vo: fair_part(2, vo, sharers) for vo in sharers} == {"a": 0, "b": 1, "c": 1}


@pytest.mark.parametrize("room", range(12))
def test_all_free_slots_are_assigned(room: int) -> None:
    sharers = {"a": Sharer(2, 5, 3), "b": Sharer(1, 0, MANY), "c": Sharer(0.5, 1, MANY)}
    assert sum(fair_part(room, vo, sharers) for vo in sharers) == room


@pytest.mark.parametrize("room", [999, 1_000, 1_001, 1_002, 20_000, UNLIMITED])
@pytest.mark.parametrize("share", [1e-3, 1 / 3, 1, 1e6])
def test_any_number_of_slots_is_assigned_one_by_one_in_effect(room: int, share: float) -> None:
    sharers = {
        "a": Sharer(share, 5, MANY, T0),
        "b": Sharer(1, 900, UNLIMITED, T0),
        "c": Sharer(1, 900, UNLIMITED),
        "d": Sharer(2, 0, 400),
        "e": Sharer(1, 3 * MANY, MANY),
    }
    parts = {vo: fair_part(room, vo, sharers) for vo in sharers}
    assert sum(parts.values()) == room
    held = {vo: each.held + parts[vo] for vo, each in sharers.items()}
    # No VO that wants more has fewer slots per share than one that got its last slot.
    last = max((held[vo] - 0.5) / sharers[vo].share for vo, part in parts.items() if part)
    wanting = [vo for vo, part in parts.items() if part < sharers[vo].wanted]
    assert last <= min((held[vo] + 0.5) / sharers[vo].share for vo in wanting)
    assert 0 <= parts["c"] - parts["b"] <= 1, "among equals the longest waiting comes first"


@pytest.mark.parametrize("budget", range(-1, 25))
def test_parts_are_reduced_to_the_budget_proportionally(budget: int) -> None:
    parts = [10, 0, 5, 1]
    cut = apportion(budget, parts)
    assert sum(cut) == min(16, max(0, budget))
    assert all(0 <= given <= part for given, part in zip(cut, parts, strict=True))
    assert cut[0] >= cut[2] >= cut[3] >= cut[1] == 0
