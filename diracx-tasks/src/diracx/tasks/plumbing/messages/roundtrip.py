"""Checks before submission that arguments arrive equal after encoding, decoding and restoring.

Scalars of plain classes need no check: `TaskSignature.scalars`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from .arguments import TaskSignature, rebuild, signature_of
from .codec import dumps, loads
from .parameters import Parameter

#: Types for which `==` is sufficient; for floats it is not.
_EXACT = frozenset({type(None), bool, int, str, bytes})
_ATOMS = _EXACT | {float, date, timedelta, Decimal, UUID}
_REMEDY = "annotate it with its class, add a Literal field to the classes of a union, or pass plain data"


def checked_arguments(task: Any) -> list[Any]:
    """Return the serialised arguments of a task.

    Raises:
        TypeError: names an argument that would not arrive equal and of the same type.
    """
    signature = signature_of(type(task))
    args = list(task.serialize() if signature.own_serialize else signature.values(task))
    _check(signature, task, args)
    return args


def _check(signature: TaskSignature, task: Any, args: list[Any]) -> None:
    names = [*signature.names, *map(str, range(len(signature.names), len(args)))]
    decoded = []
    for name, value in zip(names, args, strict=False):
        parameter = signature.parameters.get(name)
        try:
            if _needs_no_check(parameter, value):
                decoded.append(value)
                continue
            restored = loads(dumps(value))
            if signature.verbatim and parameter is not None:
                restored = signature.restore(name, restored)
        except Exception as exc:
            secret = parameter is not None and parameter.secret
            why = "it cannot be encoded" if secret else str(exc)
            raise TypeError(f"{type(task).__name__}: argument {name!r}: {why}") from (None if secret else exc)
        if signature.verbatim and not same(value, restored):
            raise _changed(task, name, value, restored)
        decoded.append(restored)
    if signature.verbatim:
        return
    try:
        rebuilt: Any = rebuild(type(task), decoded, {})
        values = list(signature.values(rebuilt))
    except Exception as exc:
        raise TypeError(f"cannot be rebuilt from its arguments: {exc}") from (None if signature.secret else exc)
    types = [*map(type, args)]
    if not (_EXACT.issuperset(types) and types == [*map(type, values)] and args == values):
        for name, value, each in zip(names, args, values, strict=False):
            if not same(value, each):
                raise _changed(task, name, value, each)
    if signature.holds_more and not same(_state(task), _state(rebuilt)):
        raise TypeError(
            f"{type(task).__name__} would not arrive equal: state besides its arguments is lost, such as private "
            "attributes or fields without `init`; make it an argument, or override serialize()"
        )


def _needs_no_check(parameter: Parameter | None, value: Any) -> bool:
    if value is None:
        return True
    untouched = parameter is None or parameter.plain or type(value) is parameter.annotation
    return untouched and _arrives_whole(value)


def _changed(task: Any, name: str, value: Any, restored: Any) -> TypeError:
    sent, arrived = (f"{type(each).__module__}.{type(each).__qualname__}" for each in (value, restored))
    how = "would not arrive equal" if sent == arrived else f"of type {sent} would arrive as {arrived}"
    return TypeError(f"{type(task).__name__}: argument {name!r} {how}; {_REMEDY}")


def _arrives_whole(value: Any) -> bool:
    """Return whether decoding returns an equal value without an annotation."""
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
    """Return a value with its types, so that `1 != True`, `0.0 != -0.0` and NaN equals itself."""
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
    """Return the state of a task for `same`; the attributes of a plain class, which may not define equality."""
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
