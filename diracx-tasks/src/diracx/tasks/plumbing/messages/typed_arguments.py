"""Check task arguments that a user typed: JSON values, each converted by its annotation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ..exceptions import TaskArgumentsError
from .arguments import signature_of
from .roundtrip import outgoing_arguments

T = TypeVar("T")


def check_arguments(cls: type[T], args: Sequence[Any], kwargs: Mapping[str, Any]) -> T:
    """Make the task from arguments that a user typed (JSON values), each converted by its annotation.

    Raises `TaskArgumentsError` with one line that names the class with its signature, the argument and what
    was given: missing, unknown or superfluous arguments, values of the wrong type, values that the class
    itself refuses and values that could not travel.
    """
    shape = signature_of(cls)
    if isinstance(args, str | bytes) or not isinstance(args, Sequence):
        raise TaskArgumentsError(f"{shape}: positional arguments must be a list, not {shape.shown(args)}")
    if not isinstance(kwargs, Mapping):
        raise TaskArgumentsError(f"{shape}: keyword arguments must be a mapping, not {shape.shown(kwargs)}")
    try:
        bound, rest = shape.bind(args, kwargs)
        shape.check_complete(bound)
        task: T = shape.check(bound, rest)
        outgoing_arguments(task)
    except Exception as exc:
        raise shape.refusal(exc, "argument ", args, kwargs) from (None if shape.secret else exc)
    return task


def argument_problems(cls: type[Any], kwargs: Mapping[str, Any]) -> list[tuple[str | None, str]]:
    """Return the errors in named arguments that a user typed: the name (None: all together) and the error.

    Finds what `check_arguments` refuses, and does not stop at the first.
    """
    shape = signature_of(cls)
    problems: list[tuple[str | None, str]] = []
    given: dict[str, Any] = {}
    for name, value in kwargs.items():
        try:
            bound, _ = shape.bind((), {name: value})
            for parameter in bound:
                shape.check_one(parameter, value)
            given |= bound
        except TypeError as exc:
            given[name] = value
            problems.append((name, str(exc).removeprefix(f"argument {name!r}").lstrip(":. ")))
    try:
        shape.check_complete(given)
    except TypeError as exc:
        problems.append((None, str(exc)))
    if not problems:
        try:
            check_arguments(cls, (), kwargs)
        except TaskArgumentsError as exc:
            problems.append((None, str(exc).removeprefix(f"{shape}: ")))
    return problems
