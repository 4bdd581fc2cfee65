"""Resolves the annotations of task arguments, and decides which values must be restored after decoding."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
from collections.abc import Iterable
from itertools import product
from typing import Annotated, Any, Literal, NewType, Union, get_args, get_origin, get_type_hints

UNKNOWN: Any = object()  # the annotation of a parameter that has none, or one that cannot be resolved

_PLAIN_TYPES = frozenset({str, int, float, bool, bytes, type(None), Any, object, list, dict})


def annotates(cls: type[Any], name: str) -> bool:
    try:
        return name in inspect.get_annotations(cls)
    except NameError:  # Python 3.14 evaluates them here
        return False


def globals_of(cls: type[Any]) -> dict[str, Any]:
    """Return the globals of the module of `cls`, even if it is not in `sys.modules`."""
    if cls.__module__ in sys.modules:
        return vars(sys.modules[cls.__module__])
    return next((f.__globals__ for f in vars(cls).values() if isinstance(f, types.FunctionType)), {})


def resolve(annotation: Any, global_names: dict[str, Any], local_names: dict[str, Any]) -> Any:
    """Return the annotation with all forward references resolved, or `UNKNOWN`."""

    def probe() -> None: ...

    probe.__annotations__ = {"value": annotation}
    try:
        return get_type_hints(probe, global_names, local_names, include_extras=True)["value"]
    except Exception:
        # A local name, or one that is imported for type checkers only.
        return UNKNOWN


def is_plain(annotation: Any) -> bool:
    """Return whether values of this type are the same after encoding and decoding."""
    if any(annotation is plain for plain in _PLAIN_TYPES):
        return True
    if isinstance(annotation, NewType):
        return is_plain(annotation.__supertype__)
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return is_plain(inner[0])
    if origin is Literal:
        return all(type(value) in _PLAIN_TYPES for value in inner)
    if origin in (list, dict, Union, types.UnionType):
        return all(map(is_plain, inner))
    return False


def nested_dataclass(annotation: Any) -> type[Any] | None:
    """Return the dataclass that `annotation` names, alone or with None."""
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        found = [nested_dataclass(part) for part in get_args(annotation)]
        return next((cls for cls in found if cls is not None), None)
    return annotation if isinstance(annotation, type) and dataclasses.is_dataclass(annotation) else None


def is_named_tuple(cls: type[Any]) -> bool:
    return issubclass(cls, tuple) and hasattr(cls, "_fields")


def layouts(name: str, classes: Iterable[type[Any]]) -> list[str]:
    """Describe the layouts of a field for its signature: its name, and the fields of each named tuple in it.

    Named tuples are encoded without field names. The first layout is the current one; the others are those before
    fields with defaults were added to a named tuple.
    """
    versions = []
    for cls in classes:
        if is_named_tuple(cls):
            required = len(cls._fields) - len(cls._field_defaults)
            versions.append([cls._fields[:number] for number in range(len(cls._fields), required - 1, -1)])
    return [name + "".join(f"({' '.join(fields)})" for fields in each) for each in product(*versions)]
