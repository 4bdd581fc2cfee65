"""The name of a task as people write it: in full, or the name of the class alone."""

from __future__ import annotations

import time

import pytest
from diracx.tasks.plumbing.scheduler.overview import matching
from diracx.tasks.plumbing.task_names import AmbiguousTaskNameError, resolve_task_name

KNOWN = ["jobs:Clean", "pilots:Clean", "pilots:Submit", "pilots:SubmitMore"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("pilots:Submit", "pilots:Submit"),
        ("Submit", "pilots:Submit"),
        ("jobs:Clean", "jobs:Clean"),
        ("submit", None),
        ("jobs:Submit", None),
        ("Sub", None),
        ("", None),
    ],
)
def test_a_class_name_stands_for_the_one_task_that_has_it(typed: str, meant: str | None) -> None:
    assert resolve_task_name(typed, KNOWN) == meant


def test_a_class_name_of_several_tasks_is_refused_and_the_candidates_are_listed() -> None:
    with pytest.raises(AmbiguousTaskNameError, match="is ambiguous; write jobs:Clean or pilots:Clean"):
        resolve_task_name("Clean", KNOWN)


def test_schedules_are_named_without_their_category_too() -> None:
    ids = ["jobs:Clean", "pilots:Clean/lhcb", "pilots:Clean/cms"]
    assert matching(["Clean/cms", "Clean", "*/lhcb", "Nope"], ids) == (sorted(ids), ["Nope"])
    with pytest.raises(AmbiguousTaskNameError):
        matching(["Clean"], ["jobs:Clean", "pilots:Clean"])


def test_many_schedules_are_found_in_linear_time() -> None:
    ids = [f"pilots:Submit@{number:05}" for number in range(20_000)]
    started = time.process_time()
    assert matching(ids, ids) == (ids, [])
    assert time.process_time() - started < 2
