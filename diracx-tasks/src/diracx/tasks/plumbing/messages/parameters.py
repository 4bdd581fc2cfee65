"""Reads the parameters of a task class: the fields of a model or dataclass, or the arguments of `__init__`."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, NewType, get_args, get_origin

from .._util.secrets import MASK
from .annotations import UNKNOWN, annotates, globals_of, is_named_tuple, is_plain, resolve
from .argument_texts import REQUIRED, one_line, reason, shown, type_text

if TYPE_CHECKING:
    from pydantic import TypeAdapter


@dataclasses.dataclass
class Parameter:
    """One argument of a task class."""

    name: str
    annotation: Any  # with its Annotated metadata; UNKNOWN if there is none
    text: str  # the annotation for error messages; empty if there is none
    default: Any = REQUIRED  # only its presence matters, and its repr in the signature
    keyword_only: bool = False
    alias: str | None = None  # alias in a pydantic model
    secret: bool = False

    def __str__(self) -> str:
        text = f"{self.name}: {self.text}" if self.text else self.name
        if self.default is REQUIRED:
            return text
        return f"{text} = {MASK if self.secret else shown(self.default, 30)}"

    @cached_property
    def plain(self) -> bool:
        """True if decoding returns an equal value without restoring."""
        return self.annotation is UNKNOWN or is_plain(self.annotation)

    @cached_property
    def adapter(self) -> TypeAdapter[Any] | None:
        """Pydantic adapter of the annotation; None if pydantic does not support it."""
        if self.annotation is UNKNOWN:
            return None
        from pydantic import ConfigDict, TypeAdapter

        # Types with their own configuration (model, dataclass) refuse another one.
        for config in (ConfigDict(arbitrary_types_allowed=True), None):
            try:
                return TypeAdapter(self.annotation, config=config)
            except Exception:  # noqa: S112 - unsupported
                continue
        return None

    def check(self, value: Any) -> Any:
        """Convert a JSON value of a user; `TypeError` if it does not match the annotation."""
        if self.adapter is None:
            return value
        try:
            checked = validate_typed(self.adapter.validate_python, self.adapter.validate_json, value)
            return list(checked) if isinstance(checked, Iterator) else checked
        except Exception as exc:
            if self.secret:
                raise TypeError(f"argument {self.name!r}: {reason(exc)}") from None
            raise TypeError(one_line(exc, f"argument {self.name!r}", value)) from exc


def validate_typed(from_python: Callable[..., Any], from_json: Callable[..., Any], value: Any) -> Any:
    """Validate input of a user with the validators of a pydantic type."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):  # a Python value from code
        return from_python(value, by_alias=True, by_name=True)
    # Strict JSON mode refuses "5" as int, and accepts "2026-01-01T00:00:00Z" as datetime and a list as tuple.
    return from_json(text, strict=True, by_alias=True, by_name=True)


def classes_in(annotation: Any, seen: set[Any]) -> Iterator[type[Any]]:
    """Yield the classes in an annotation, at any depth, without duplicates."""
    if isinstance(annotation, NewType):
        annotation = annotation.__supertype__
    for part in get_args(annotation):
        yield from classes_in(part, seen)
    cls = get_origin(annotation) or annotation
    if not isinstance(cls, type) or cls in seen:
        return
    seen.add(cls)
    yield cls
    parts: list[Any] = []
    if hasattr(cls, "__pydantic_root_model__"):
        parts = [parameter.annotation for parameter in of_model(cls)]
    elif dataclasses.is_dataclass(cls):
        parts = [parameter.annotation for parameter in of_dataclass(cls, nested=True)]
    elif is_named_tuple(cls):
        parts = [resolve(each, globals_of(cls), {}) for each in vars(cls).get("__annotations__", {}).values()]
    for part in parts:
        yield from classes_in(part, seen)


def has_generated_init(cls: type[Any]) -> bool:
    """Return whether the `__init__` of a class was written by `@dataclass`."""
    owner = next((base for base in cls.__mro__ if "__init__" in vars(base)), object)
    parameters = vars(owner).get("__dataclass_params__")
    return parameters is not None and parameters.init


def of_model(cls: type[Any]) -> list[Parameter]:
    """Return the fields of a pydantic model."""
    found = []
    for name, info in cls.model_fields.items():
        annotation = info.annotation
        for extra in info.metadata:
            annotation = Annotated[annotation, extra]
        default = REQUIRED if info.is_required() else info.default_factory or info.default
        alias = info.validation_alias or info.alias
        alias = alias if isinstance(alias, str) else None
        found.append(Parameter(name, annotation, type_text(info.annotation), default, alias=alias))
    return found


def of_dataclass(cls: type[Any], *, nested: bool = False) -> list[Parameter]:
    """Return the fields of a dataclass that its `__init__` takes.

    Raises:
        TypeError: a parameter of `__init__` is not a field; not for a `nested` one.
    """
    found = []
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        owner = next((b for b in cls.__mro__ if annotates(b, field.name)), cls)
        resolved = resolve(field.type, globals_of(owner), dict(vars(owner)))
        default = field.default
        if default is dataclasses.MISSING:
            factory = field.default_factory
            default = REQUIRED if factory is dataclasses.MISSING else factory
        keyword_only = field.kw_only is True
        found.append(Parameter(field.name, resolved, type_text(field.type), default, keyword_only))
    names = {parameter.name for parameter in found}
    for name, parameter in inspect.signature(cls).parameters.items():
        if name not in names and parameter.default is parameter.empty and not nested:
            raise TypeError(f"{cls.__name__} takes {name!r}, which is not a field: override serialize()")
    return found


def of_init(cls: type[Any]) -> tuple[list[Parameter], bool]:
    """Return the parameters of a hand-written `__init__`, and whether it takes `*args` or `**kwargs`."""
    function = cls.__init__
    if function is object.__init__:
        return [], False
    found, extra = [], False
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            extra = True
            continue
        annotation = parameter.annotation
        has_default = parameter.default is not parameter.empty
        found.append(
            Parameter(
                parameter.name,
                UNKNOWN
                if annotation is parameter.empty
                else resolve(annotation, getattr(function, "__globals__", {}), {}),
                "" if annotation is parameter.empty else type_text(annotation),
                parameter.default if has_default else REQUIRED,
                parameter.kind is parameter.KEYWORD_ONLY,
            )
        )
    return found, extra
