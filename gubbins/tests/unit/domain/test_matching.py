"""Matching of waiting jobs with compute elements."""

from __future__ import annotations

import random
import time
from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gubbins.domain.matching import Group, TaskQueue, count_jobs, group_jobs, match, share_jobs
from gubbins.domain.rules import CERules


def served(queue: dict[str, Any], **rules: Any) -> bool:
    required = {key: frozenset(value) if isinstance(value, list) else value for key, value in queue.items()}
    return bool(group_jobs([TaskQueue(1, **required)], {"ce": CERules(**rules)}))


@pytest.mark.parametrize(
    ("queue", "rules", "expected"),
    [
        ({}, {}, True),
        ({}, {"site": "LCG.CERN.ch", "tags": ["GPU"], "processors": 8, "max_cpu_seconds": 1}, True),
        ({"sites": ["LCG.CERN.ch"]}, {"site": "LCG.CERN.ch"}, True),
        ({"sites": ["LCG.CERN.ch", "LCG.PIC.es"]}, {"site": "LCG.RAL.uk"}, False),
        ({"sites": ["LCG.CERN.ch"]}, {}, False),
        ({"banned_sites": ["LCG.CERN.ch"]}, {"site": "LCG.CERN.ch"}, False),
        ({"banned_sites": ["LCG.CERN.ch"]}, {"site": "LCG.PIC.es"}, True),
        ({"banned_sites": ["LCG.CERN.ch"]}, {}, True),
        ({"grid_ces": ["ce"]}, {}, True),
        ({"grid_ces": ["ce01.cern.ch"]}, {}, False),
        ({"grid_ces": ["ce01.cern.ch"]}, {"grid_ce": "ce01.cern.ch"}, True),
        ({"platforms": ["x86_64-el9"]}, {"platform": "x86_64-el9"}, True),
        ({"platforms": ["x86_64-el9", "x86_64-el8"]}, {"platform": ["x86_64-el7", "x86_64-el8"]}, True),
        ({"platforms": ["x86_64-el9"]}, {"platform": "aarch64-el9"}, False),
        ({"platforms": ["x86_64-el9"]}, {}, True),
        ({"platforms": ["x86_64-el9"]}, {"platform": "ANY"}, True),
        ({"job_types": ["User"]}, {"job_types": ["Merge", "Any"]}, True),
        ({"job_types": ["MCSimulation"]}, {"job_types": ["User"]}, False),
        ({"job_types": ["MCSimulation"]}, {"job_types": ["User", "MCSimulation"]}, True),
        ({"job_types": ["MCSimulation"]}, {}, True),
        ({"tags": ["GPU"]}, {}, False),
        ({"tags": ["GPU"]}, {"tags": ["GPU"]}, True),
        ({"tags": ["GPU"]}, {"required_tags": ["GPU"]}, True),
        ({}, {"required_tags": ["GPU"]}, False),
        ({"tags": ["GPU", "8Processors"]}, {"tags": ["GPU"]}, False),
        ({"tags": ["GPU", "8Processors"]}, {"tags": ["GPU"], "processors": 8}, True),
        ({"tags": ["8Processors"]}, {"processors": 4}, False),
        ({"tags": ["2Processors"]}, {"processors": 4}, True),
        ({"tags": ["MultiProcessor"]}, {}, False),
        ({"tags": ["MultiProcessor"]}, {"processors": 2}, True),
        ({"tags": ["4GB"]}, {}, False),
        ({"tags": ["4GB"]}, {"max_memory_mb": 4095}, False),
        ({"tags": ["4GB"]}, {"max_memory_mb": 4096}, True),
        ({"tags": ["a tag that is not described"]}, {"tags": ["GPU"], "processors": 64}, False),
        ({"tags": ["GPU", "8Processors"]}, {"tags": ["any"]}, True),
        ({"tags": ["GPU"]}, {"tags": ["ANY"], "required_tags": ["8Processors"]}, False),
        ({"tags": ["GPU"]}, {"tags": ["GPU"], "required_tags": ["Any"]}, True),
        ({}, {"required_tags": ["Any", "GPU"]}, True),
        ({"cpu_seconds": 86_400}, {}, True),
        ({"cpu_seconds": 86_400}, {"max_cpu_seconds": 86_400}, True),
        ({"cpu_seconds": 86_401}, {"max_cpu_seconds": 86_400}, False),
    ],
)
def test_a_compute_element_serves_jobs_whose_requirements_it_meets(
    queue: dict[str, Any], rules: dict[str, Any], expected: bool
) -> None:
    assert served(queue, **rules) is expected


def test_jobs_are_counted_by_the_compute_elements_that_could_serve_them() -> None:
    ces = {"cpu": CERules(), "big": CERules(processors=8), "gpu": CERules(required_tags=("GPU",))}
    queues = [
        TaskQueue(5),
        TaskQueue(7, cpu_seconds=100),
        TaskQueue(3, tags=frozenset({"4Processors"})),
        TaskQueue(2, tags=frozenset({"GPU"})),
        TaskQueue(9, sites=frozenset({"nowhere"})),
    ]
    groups = group_jobs(queues, ces)
    assert groups == {frozenset({"cpu", "big"}): 12, frozenset({"big"}): 3, frozenset({"gpu"}): 2}
    assert count_jobs(groups) == {"cpu": 12, "big": 15, "gpu": 2}


NAMES = "abcde"
_groups = st.dictionaries(st.frozensets(st.sampled_from(NAMES), min_size=1), st.integers(0, 6), max_size=6)
_numbers = st.fixed_dictionaries({name: st.integers(0, 6) for name in NAMES})


def largest_matching(groups: dict[Group, int], pilots: dict[str, int]) -> int:
    """The size by König and Hall: the smallest cut over all sets of compute elements."""
    subsets = [frozenset(n for i, n in enumerate(NAMES) if bits >> i & 1) for bits in range(1 << len(NAMES))]
    return min(
        sum(pilots[name] for name in cut) + sum(jobs for group, jobs in groups.items() if not group <= cut)
        for cut in subsets
    )


@given(_groups, _numbers, st.none() | st.integers(0, 9))
def test_the_maximum_number_of_waiting_pilots_is_matched_with_jobs(
    groups: dict[Group, int], pilots: dict[str, int], max_steps: int | None
) -> None:
    """With a limit of the search there may be fewer."""
    left, free = match(groups, pilots) if max_steps is None else match(groups, pilots, max_steps=max_steps)
    matched = sum(groups.values()) - sum(left.values())
    if max_steps is None:
        assert matched == largest_matching(groups, pilots)
    assert sum(free.values()) == sum(pilots.values()) - matched
    assert all(0 < left[group] <= groups[group] for group in left)
    assert all(0 <= free[name] <= pilots[name] for name in free)
    # What is left on both sides could not be matched.
    assert not any(free.get(name) for name in chain(*left))


def test_thousands_of_task_queues_are_matched_quickly() -> None:
    """A worker does nothing else meanwhile: a fifth of a second, and not some for each task queue."""
    chance = random.Random(1)
    ces = {f"ce{number}": CERules(site=f"s{number}") for number in range(100)}
    sites = [f"s{number}" for number in range(100)]
    queues = [
        TaskQueue(chance.randint(1, 50), sites=frozenset(chance.sample(sites, chance.randint(1, 5))))
        for _ in range(10_000)
    ]
    begun = time.process_time()
    left, free = match(group_jobs(queues, ces), dict.fromkeys(ces, 10))
    assert time.process_time() - begun < 3
    assert not any(free.values())
    assert sum(left.values()) == sum(queue.jobs for queue in queues) - 1_000


@pytest.mark.parametrize(("number", "ces", "largest"), [(10_000, 100, 6), (5_000, 300, 250)])
def test_thousands_of_groups_with_about_as_many_pilots_as_jobs_are_matched_quickly(
    number: int, ces: int, largest: int
) -> None:
    """Meanwhile all compute elements are locked for the rounds of other VOs, too."""
    chance = random.Random(1)
    names = [f"ce{each}" for each in range(ces)]
    groups = {
        frozenset(chance.sample(names, chance.randint(2, largest))): chance.randint(1, 3) for _ in range(number)
    }
    pilots = {name: int(number * 7 / ces * chance.random() ** 3) for name in names}
    begun = time.process_time()
    left, free = match(groups, pilots)
    assert time.process_time() - begun < 3
    assert not any(free.get(name) for name in chain(*left))
    assert sum(groups.values()) - sum(left.values()) == sum(pilots.values()) - sum(free.values())


@given(_groups, _numbers)
def test_shared_jobs_fill_no_more_than_the_room_and_no_job_is_counted_twice(
    groups: dict[Group, int], room: dict[str, int]
) -> None:
    given_, left = share_jobs(groups, room)
    assert all(0 <= given_[name] <= room[name] for name in room)
    assert sum(given_.values()) + sum(left.values()) == sum(groups.values())
    for group, jobs in left.items():
        assert not jobs or all(given_[name] == room[name] for name in group), "there was room"


def test_compute_elements_share_jobs_in_proportion_to_their_room_and_few_choices_come_first() -> None:
    both, only = frozenset({"a", "b"}), frozenset({"a"})
    assert share_jobs({both: 12}, {"a": 20, "b": 10})[0] == {"a": 8, "b": 4}
    assert share_jobs({both: 10, only: 20}, {"a": 20, "b": 10})[0] == {"a": 20, "b": 10}
