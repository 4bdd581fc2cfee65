"""Messages of other versions of a task class: accepted or refused, never misread."""

from __future__ import annotations

import collections
import dataclasses
from dataclasses import field
from typing import Any

import msgpack
import pytest
from diracx.tasks.operations.masking import masked_arguments
from diracx.tasks.plumbing.base_task import BaseTask
from diracx.tasks.plumbing.broker.models import TaskMessage
from diracx.tasks.plumbing.exceptions import TaskArgumentsError
from diracx.tasks.plumbing.registry import TaskRegistry
from diracx.tasks.plumbing.submission.client import Binding
from diracx.tasks.plumbing.task_vo import vo_of
from pydantic import (
    create_model,
)
from support.typed_values import Box, arrived, received

# ---- versions of a class ----


def version(*names: str) -> Any:
    fields: list[Any] = [(name, str, field(default="new")) if name == "added" else (name, str) for name in names]
    return dataclasses.make_dataclass("Task", fields, bases=(BaseTask,), kw_only=names[:1] == ("added",))


def sent(task: Any) -> bytes:
    return Binding(None, TaskRegistry({"test:Task": type(task)})).submission(task).message.dumpb()


@pytest.mark.parametrize(
    "fields", [("b", "a"), ("a", "x", "b"), ("x", "a", "b"), ("a", "c"), ("b",), ("a",), ("a", "b", "c")]
)
def test_a_message_for_another_version_of_a_class_is_refused(fields: tuple[str, ...]) -> None:
    with pytest.raises(TaskArgumentsError):
        received(sent(version("a", "b")("1", "2")), version(*fields))


def with_named_tuple(fields: list[Any], around: Any, defaults: int) -> Any:
    """A class with one argument, in which a named tuple has these fields, the last of them with defaults."""
    point = collections.namedtuple("Point", fields, defaults=[""] * defaults)  # made by the test
    point.__annotations__ = dict.fromkeys(fields, str)
    cls = dataclasses.make_dataclass("Task", [("value", around(point))], bases=(BaseTask,))
    return cls, point


AROUND: list[Any] = [
    (lambda cls: cls, lambda value: value),
    (lambda cls: list[cls], lambda value: [value]),
    (lambda cls: dict[str, cls | None], lambda value: {"a": value}),
    (lambda cls: Box[cls], Box),
    (lambda cls: create_model("Model", inner=(cls, ...)), None),
]


@pytest.mark.parametrize(("around", "put"), AROUND)
@pytest.mark.parametrize(
    ("fields", "arrives"),
    [("ab", True), ("abc", True), ("abcd", True), ("ba", False), ("xab", False), ("acb", False), ("a", False)],
)
def test_a_named_tuple_of_another_version_arrives_with_its_values_in_their_places_or_is_refused(
    around: Any, put: Any, fields: str, arrives: bool
) -> None:
    old, point = with_named_tuple(["a", "b"], around, 0)
    new, _ = with_named_tuple(list(fields), around, max(0, len(fields) - 2))
    model = dataclasses.fields(old)[0].type
    data = sent(old(put(point("1", "2")) if put else model(inner=point("1", "2"))))
    if arrives:
        assert "'1'" in repr(received(data, new))
    else:
        with pytest.raises(TaskArgumentsError, match="other fields, or the same in another order"):
            received(data, new)


class TakesAnything(BaseTask):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs


class TakesMore(BaseTask):
    def __init__(self, number: int, **more: Any) -> None:
        self.number, self.more = number, more


def test_additional_arguments_of_a_class_are_not_lost_silently() -> None:
    assert arrived(TakesMore(1)).number == 1
    assert arrived(TakesAnything()).args == ()
    for task in (TakesMore(1, further=2), TakesAnything(1), TakesAnything(further=2)):
        with pytest.raises(TypeError, match="state besides its arguments is lost"):
            arrived(task)


def test_a_message_for_another_version_is_shown_by_position_and_of_no_vo() -> None:
    message = TaskMessage.loadb(sent(version("vo", "a")("lhcb", "1")))
    same, other = version("vo", "a"), version("a", "vo")
    assert (vo_of(same, message), masked_arguments(same, message)) == ("lhcb", {"vo": "lhcb", "a": "1"})
    assert (vo_of(other, message), masked_arguments(other, message)) == (None, {"0": "lhcb", "1": "1"})


def test_fields_with_defaults_may_be_added_at_the_end() -> None:
    new = version("a", "b", "added")
    assert received(sent(version("a", "b")("1", "2")), new) == new("1", "2", "new")


def test_messages_of_the_published_package_and_of_later_versions_are_accepted() -> None:
    cls = version("a", "b")
    fields = {"task_id": "1", "task_name": "test:Task", "labels": {}, "task_args": ["1", "2"], "task_kwargs": {}}
    for more in ({}, {"trace_context": {}}, {"trace_context": {}, "later": {"x": 1}}):
        assert received(msgpack.packb({**fields, **more}), cls) == cls("1", "2")


def test_messages_keep_the_published_fields_with_a_few_more_bytes() -> None:
    task = version("a", "b")("1", "2")
    fields = msgpack.unpackb(sent(task), timestamp=3)
    assert fields["task_args"] == ["1", "2"]
    assert fields.keys() - {"labels", "task_kwargs", "trace_context"} == {
        "task_id",
        "task_name",
        "task_args",
        "sig",
    }
    assert len(msgpack.packb({"sig": fields["sig"]})) <= 10
    retried = TaskMessage.loadb(sent(task))
    assert TaskMessage.loadb(retried.dumpb()).sig == fields["sig"]
    assert "sig" not in msgpack.unpackb(sent(version()()))
