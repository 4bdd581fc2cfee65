"""Validation of labels at submission and delivery."""

from __future__ import annotations

from typing import Any

import pytest
from diracx.tasks.plumbing.broker.labels import checked_labels
from diracx.tasks.plumbing.broker.models import TaskMessage
from diracx.tasks.plumbing.messages.codec import dumps

WRONG: list[tuple[str, Any]] = [
    ("child_results", "3 files"),
    ("child_results", {"group": "g"}),
    ("child_results", {"group": 1, "total": 1}),
    ("child_results", {"group": "g", "total": -1}),
    ("child_results", None),
    ("group_id", 5),
    ("group_id", None),
    ("group_results", "yes"),
    ("secret", "all"),
    ("secret", [-1]),
    ("secret", {"a": 1}),
    ("schedule", 7),
    ("schedule_due_ms", "now"),
    ("schedule_due_ms", 2**70),
    ("result_ttl_seconds", 0),
    ("result_ttl_seconds", True),
    ("result_ttl_seconds", 1.5),
    ("result_ttl_seconds", 10**400),
    ("attempts", 1),
    ("attempts", [1]),
    ("attempts", [{"message": 5}]),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_label_of_the_task_system_with_another_value_is_refused_in_one_line(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^the label {name} (must be|is the task system's own)") as refused:
        checked_labels({"mine": 1, name: value})
    assert len(str(refused.value)) < 300
    fields = {"task_id": "t", "task_name": "n", "labels": {name: value}}
    with pytest.raises(ValueError, match=rf"^not a task message: the label {name} must be"):
        TaskMessage.loadb(dumps(fields))


def test_labels_of_the_users_own_may_hold_anything() -> None:
    labels = {"mine": [{"a": (1, 2)}], "child": None, "group_id": "g", "group_results": True, "secret": [0, 2]}
    assert checked_labels(labels) == labels
    given = {**labels, "attempts": [{"type": "E", "message": "m"}], "child_results": {"group": "g", "total": 0}}
    assert TaskMessage.loadb(dumps({"task_id": "t", "task_name": "n", "labels": given})).labels == given


@pytest.mark.parametrize("labels", [{"priority": "urgent"}, {"size": 12}, {"priority": None}, {"size": ["small"]}])
def test_a_label_of_an_unknown_queue_is_refused_with_the_known_ones(labels: dict[str, Any]) -> None:
    [name] = labels
    with pytest.raises(ValueError, match=rf"^the label {name} must be \w+, \w+, \w+, not "):
        checked_labels(labels)


@pytest.mark.parametrize(
    "fields",
    [
        {"trace_context": []},
        {"trace_context": {"traceparent": 1}},
        {"trace_context": {1: "x"}},
        {"labels": None},
        {"task_args": "abc"},
        {"task_kwargs": [1]},
        {"task_id": b"bytes"},
        {"task_name": 3},
        {"task_id": "half \udc80 of a pair"},
    ],
)
def test_a_message_with_a_field_of_the_wrong_kind_is_refused_in_one_line(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^not a task message: ") as refused:
        TaskMessage.loadb(dumps({"task_id": "t", "task_name": "n", **fields}))
    assert len(str(refused.value)) < 500
