"""Check before submission that arguments arrive equal.

The wire flattens values (`wire`), and annotations bring them back (`arguments`). Where both together would make
something else of a value, it is refused here, while its author still looks. What a class needs is worked out once;
scalars of plain classes cost one look at their types.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from .arguments import Parameter, TaskSignature, rebuild, signature_of
from .codec import dumps, loads

#: Of these, `==` and the type say all; of floats, they do not.
_EXACT = frozenset({type(None), bool, int, str, bytes})
_SCALARS = _EXACT | {float}
_ATOMS = _SCALARS | {date, timedelta, Decimal, UUID}
_WAY_OUT = "annotate it with its class, tell the classes of a union apart by a Literal field, or pass plain data"


def outgoing_arguments(task: Any, shape: TaskSignature | None = None) -> list[Any]:
    """Return the arguments of a task as they are sent.

    Raises:
        TypeError: when one of them would not arrive equal and of the same type; names it.
    """
    shape = shape or signature_of(type(task))
    args = list(task.serialize() if shape.own_serialize else shape.values(task))
    if not (shape.plain_and_verbatim and _SCALARS.issuperset(map(type, args))):
        _check(shape, task, args)
    return args


def _check(shape: TaskSignature, task: Any, args: list[Any]) -> None:
    names = [*shape.names, *map(str, range(len(shape.names), len(args)))]
    arrived = []
    for name, value in zip(names, args, strict=False):
        parameter = shape.parameters.get(name)
        try:
            if _needs_no_check(parameter, value):
                arrived.append(value)
                continue
            there = loads(dumps(value))
            if shape.verbatim and parameter is not None:
                there = parameter.restore(there)
        except Exception as exc:
            secret = parameter is not None and parameter.secret
            why = "it cannot be put on the wire" if secret else str(exc)
            raise TypeError(f"{type(task).__name__}: argument {name!r}: {why}") from (None if secret else exc)
        if shape.verbatim and not same(value, there):
            raise _changed(task, name, value, there)
        arrived.append(there)
    if shape.verbatim:
        return
    try:
        again: Any = rebuild(type(task), arrived, {})
        there = list(shape.values(again))
    except Exception as exc:
        raise TypeError(f"cannot be made again from its arguments: {exc}") from (None if shape.secret else exc)
    types = [*map(type, args)]
    if not (_EXACT.issuperset(types) and types == [*map(type, there)] and args == there):
        for name, value, each in zip(names, args, there, strict=False):
            if not same(value, each):
                raise _changed(task, name, value, each)
    if shape.holds_more and not same(_state(task), _state(again)):
        raise TypeError(
            f"{type(task).__name__} would not arrive as it is: something besides its arguments is lost, such as "
            "private attributes or fields without `init`; make it an argument, or override serialize()"
        )


def _needs_no_check(parameter: Parameter | None, value: Any) -> bool:
    if value is None:
        return True
    untouched = parameter is None or parameter.plain or type(value) is parameter.annotation
    return untouched and _arrives_whole(value)


def _changed(task: Any, name: str, value: Any, there: Any) -> TypeError:
    here, other = (f"{type(each).__module__}.{type(each).__qualname__}" for each in (value, there))
    how = "would not arrive equal" if here == other else f"of type {here} would arrive as {other}"
    return TypeError(f"{type(task).__name__}: argument {name!r} {how}; {_WAY_OUT}")


def _arrives_whole(value: Any) -> bool:
    """Return whether decoding returns the value as it is, without an annotation."""
    cls = type(value)
    if cls in _ATOMS:
        return True
    if cls is dict:
        return _all_whole(value) and _all_whole(value.values())
    if cls in (list, tuple, set, frozenset):
        return _all_whole(value)
    return cls in (datetime, time) and value.tzinfo is None


def _all_whole(values: Any) -> bool:
    return set(map(type, values)) <= _ATOMS or all(map(_arrives_whole, values))


def same(one: Any, other: Any) -> bool:
    """Return whether two values are equal and of the same types, at every depth."""
    return bool(_comparable(one) == _comparable(other))


def _comparable(value: Any) -> tuple[Any, ...]:
    """A value with its types, so that `==` tells `1` from `True` and `0.0` from `-0.0`, and NaN is itself."""
    content: Any = value
    if isinstance(value, float | Decimal):
        content = repr(value)
    elif isinstance(value, datetime) and value.utcoffset() is not None:
        content = value.astimezone(UTC)
    elif isinstance(value, datetime | time):
        content = (value, value.fold)
    elif isinstance(value, Mapping):
        content = [(_comparable(key), _comparable(each)) for key, each in value.items()]
    elif isinstance(value, list | tuple):
        content = tuple(map(_comparable, value))
    elif isinstance(value, set | frozenset):
        content = frozenset(map(_comparable, value))
    elif _has_parts(value):
        content = None
    return type(value), content, *(_comparable(getattr(value, name, None)) for name in _part_names(value))


def _state(task: Any) -> Any:
    """Return the state that `same` can compare: a hand-written `__init__` says nothing about equality."""
    return task if _has_parts(task) else vars(task)


def _has_parts(value: Any) -> bool:
    return dataclasses.is_dataclass(value) or hasattr(value, "__pydantic_root_model__")


def _part_names(value: Any) -> list[str]:
    """Return the attributes by which the class compares its values."""
    if hasattr(value, "__pydantic_root_model__"):
        return [*type(value).__pydantic_fields__, "__pydantic_extra__", "__pydantic_private__"]
    if dataclasses.is_dataclass(value):
        return [each.name for each in dataclasses.fields(value) if each.init or each.compare]
    return ["default_factory"] if hasattr(value, "default_factory") else []
