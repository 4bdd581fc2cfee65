"""Checks and converts arguments of tasks that users enter as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ..exceptions import TaskArgumentsError
from .arguments import signature_of
from .roundtrip import checked_arguments

T = TypeVar("T")


def check_arguments(cls: type[T], args: Sequence[Any], kwargs: Mapping[str, Any]) -> T:
    """Make the task from JSON values, each converted by its annotation.

    Raises `TaskArgumentsError` with one line that names the class with its signature, the argument and the value,
    for missing, unknown or superfluous arguments, values of the wrong type, values that the class refuses, and
    values that would not arrive equal.
    """
    signature = signature_of(cls)
    try:
        bound, rest = signature.bind(args, kwargs)
        signature.check_complete(bound)
        task: T = signature.check(bound, rest)
        checked_arguments(task)
    except BaseException as exc:  # the constructor may raise anything
        raise signature.refusal(exc, "argument ", args, kwargs) from (None if signature.secret else exc)
    return task


def argument_problems(cls: type[Any], kwargs: Mapping[str, Any]) -> list[tuple[str | None, str]]:
    """Return all errors of `check_arguments` in named arguments: name (None: all together) and error."""
    signature = signature_of(cls)
    problems: list[tuple[str | None, str]] = []
    given: dict[str, Any] = {}
    for name, value in kwargs.items():
        try:
            bound, _ = signature.bind((), {name: value})
            for parameter in bound:
                signature.check_one(parameter, value)
            given |= bound
        except TypeError as exc:
            given[name] = value
            problems.append((name, str(exc).removeprefix(f"argument {name!r}").lstrip(":. ")))
    try:
        signature.check_complete(given)
    except TypeError as exc:
        problems.append((None, str(exc)))
    if not problems:
        try:
            check_arguments(cls, (), kwargs)
        except TaskArgumentsError as exc:
            problems.append((None, str(exc).removeprefix(f"{signature}: ")))
    return problems
