"""Serialises tasks to arguments, and rebuilds them.

The arguments are the fields of a dataclass or pydantic model, or the parameters of `__init__` of a plain class,
which must keep each in an attribute of that name, with or without a leading underscore. A class that overrides
`serialize` is rebuilt with `cls(*args)`.

The signature of a class is computed once. Fields of plain types are passed as decoded; a pydantic `TypeAdapter`
restores other types (nested dataclasses and models, enums, paths). As Python does not check the annotations of
dataclasses, `rebuild` passes a value that does not match its annotation unchanged. `typed_arguments` checks input
of users. `roundtrip` refuses, before submission, arguments that would not arrive equal.

Error messages about classes with secret fields do not show values.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice, product
from typing import Any, TypeVar
from zlib import crc32

from .._util.secrets import hide
from ..exceptions import TaskArgumentsError
from .annotations import layouts, nested_dataclass
from .argument_texts import REQUIRED, one_line, reason
from .parameters import (
    Parameter,
    classes_in,
    has_generated_init,
    of_dataclass,
    of_init,
    of_model,
    validate_typed,
)

T = TypeVar("T")

_SCALARS = frozenset({type(None), bool, int, float, str, bytes})


def field_names(cls: type[Any]) -> tuple[str, ...]:
    """Return the names of the arguments of `cls`, in the order of `serialize`."""
    return signature_of(cls).names


def serialize(task: Any) -> tuple[Any, ...]:
    """Return the values of the fields of a task, in order.

    Raises `TypeError` if a plain class has no attribute for a parameter.
    """
    return signature_of(type(task)).values(task)


def rebuild(cls: type[T], args: Sequence[Any], kwargs: Mapping[str, Any], sig: int = 0) -> T:
    """Make a task from decoded arguments.

    Args:
        sig: signature of the class that made `args`, see `TaskSignature.signature`; 0: unknown.

    Raises `TaskArgumentsError` if the class does not accept them, or has other fields in their positions.
    """
    signature = signature_of(cls)
    task: T
    try:
        given_all = len(args) == len(signature.names)
        if sig and not ((given_all and sig == signature.of_all) or signature.has_signature(sig, len(args))):
            raise TypeError(
                "its arguments were made by a version of the class that has other fields, or the same in another "
                "order; run it with that version, or discard it and submit it again"
            )
        if signature.all_plain and given_all and not kwargs:
            task = cls(*args)
            return task
        of_execute = execute_arguments(cls, kwargs)
        bound, rest = signature.bind(args, {name: v for name, v in kwargs.items() if name not in of_execute})
        task = signature.construct({name: signature.restore(name, v) for name, v in bound.items()}, rest)
        return task
    except (TypeError, ValueError) as exc:
        raise signature.refusal(exc, "", args, kwargs) from (None if signature.secret else exc)


def execute_arguments(cls: type[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of `execute` that the class does not take; version 0.7 passes all to it."""
    signature = signature_of(cls)
    accepted = inspect.signature(cls.execute).parameters if kwargs and not signature.extra else {}
    takes_all = any(each.kind is each.VAR_KEYWORD for each in accepted.values())
    of_class = {*signature.names, *signature.aliases}
    return {name: v for name, v in kwargs.items() if name not in of_class and (takes_all or name in accepted)}


def is_made_for(cls: type[Any], sig: int, count: int) -> bool:
    """Return whether the first `count` arguments of a message match the current fields of the class."""
    return not sig or signature_of(cls).has_signature(sig, count)


def secret_names(cls: type[Any]) -> frozenset[str]:
    """Return the secret fields: those that the class declares, and those with pydantic's secret types."""
    return signature_of(cls).secret


def check_secret_fields(cls: type[Any]) -> None:
    """Check that the class has all its `secret_fields`: values of a misspelt one would be visible.

    Raises:
        TypeError: names the missing fields.
    """
    signature = signature_of(cls)
    if signature.extra:  # it accepts any keyword
        return
    annotated = {name for base in cls.__mro__ for name in vars(base).get("__annotations__", ())}
    undeclared = cls.secret_fields - signature.parameters.keys() - annotated
    if unknown := sorted(name for name in undeclared if not hasattr(cls, name)):
        raise TypeError(
            f"{cls.__module__}.{cls.__qualname__}: secret_fields has unknown fields "
            f"{', '.join(map(repr, unknown))}; the fields are {', '.join(signature.names) or 'none'}"
        )


def secret_positions(cls: type[Any]) -> list[int]:
    """Return the positions of the secret arguments; all, if the class overrides `serialize`."""
    signature = signature_of(cls)
    if not signature.secret:
        return []
    if signature.own_serialize:
        return list(range(max(64, len(signature.names))))
    return sorted(signature.secret_positions)


def may_have_vo(cls: type[Any]) -> bool:
    """Return whether a task of this class may have a VO: it has a field `vo`, or a hand-written `__init__`."""
    signature = signature_of(cls)
    generated = signature.model or dataclasses.is_dataclass(cls) or not signature.names
    return "vo" in signature.names or signature.extra or hasattr(cls, "vo") or not generated


class TaskSignature:
    """Signature of a task class: its arguments and how to rebuild it."""

    def __init__(self, cls: type[Any], parameters: Sequence[Parameter], *, model: bool, extra: bool) -> None:
        self.cls = cls
        self.parameters = {parameter.name: parameter for parameter in parameters}
        self.names = tuple(self.parameters)
        self.aliases = {p.alias: p.name for p in parameters if p.alias}
        self.model = model  # a pydantic model, constructed by keyword
        self.extra = extra  # takes *args or **kwargs
        self.all_plain = not model and all(p.plain and not p.keyword_only for p in parameters)
        declared: frozenset[str] = getattr(cls, "secret_fields", frozenset())
        classes = {p.name: list(classes_in(p.annotation, set())) for p in parameters}
        self.secret = declared | {
            name for name, found in classes.items() if any(hasattr(cls, "get_secret_value") for cls in found)
        }
        self.secret_positions = frozenset(i for i, name in enumerate(self.names) if name in self.secret)
        for parameter in parameters:
            parameter.secret = parameter.name in self.secret
        self.own_serialize = own_serialize(cls)
        # The constructor does not change the arguments.
        self.verbatim = self.own_serialize or not (
            model or ((parameters or extra) and not has_generated_init(cls)) or hasattr(cls, "__post_init__")
        )
        # A task may have state besides its arguments.
        self.holds_more = extra or any(
            (
                *getattr(cls, "__private_attributes__", ()),
                *(field for field in getattr(cls, "__dataclass_fields__", {}).values() if not field.init),
            )
        )
        self.plain_and_verbatim = self.verbatim and all(p.plain for p in parameters)
        self._layouts = [layouts(name, found) for name, found in classes.items()]
        self.of_all = _hash([each[0] for each in self._layouts])  # the signature of all fields

    def __str__(self) -> str:
        return f"{self.cls.__name__}({', '.join(map(str, self.parameters.values()))})"

    def signature(self, count: int) -> int:
        """Return a hash of the layouts of the first `count` fields, which is part of the message; 0 for none."""
        if count == len(self.names):
            return self.of_all
        return _hash([each[0] for each in self._layouts[:count]])

    def has_signature(self, sig: int, count: int) -> bool:
        """Return whether `sig` matches the first `count` fields, now or before named tuples got more fields."""
        if sig == self.signature(count):
            return True
        earlier = islice(product(*self._layouts[:count]), _MOST_LAYOUTS)
        return any(sig == _hash(each) for each in earlier)

    def secret_values(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the secret arguments; all positional ones if the class overrides `serialize`."""
        if not self.secret:
            return []
        every = self.own_serialize
        found = [value for position, value in enumerate(args) if every or position in self.secret_positions]
        return found + [value for name, value in kwargs.items() if self.aliases.get(name, name) in self.secret]

    def refusal(
        self, exc: BaseException, prefix: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> TaskArgumentsError:
        """Make the error for arguments that the class does not accept."""
        from pydantic import ValidationError

        if not self.secret:
            return TaskArgumentsError(f"{self}: {one_line(exc, prefix)}")
        if isinstance(exc, ValidationError):
            path = ".".join(str(part) for part in exc.errors(include_url=False, include_input=False)[0]["loc"])
            return TaskArgumentsError(f"{self}: {f'argument {path!r}: ' if path else ''}{reason(exc)}")
        # A message of the class, which may quote values.
        return TaskArgumentsError(f"{self}: {hide(one_line(exc), self.secret_values(args, kwargs))}")

    def check_one(self, name: str, value: Any) -> Any:
        return self.parameters[name].check(value)

    def values(self, task: Any) -> tuple[Any, ...]:
        try:
            return tuple([getattr(task, name) for name in self.names])
        except AttributeError:
            return tuple(self._kept(task, name) for name in self.names)

    def scalars(self, task: Any) -> list[Any] | None:
        """Return the serialised arguments if all are scalars that need no check; else None."""
        if not self.plain_and_verbatim:
            return None
        args = list(task.serialize() if self.own_serialize else self.values(task))
        return args if _SCALARS.issuperset(map(type, args)) else None

    def _kept(self, task: Any, name: str) -> Any:
        for attribute in (name, f"_{name}"):
            if hasattr(task, attribute):
                return getattr(task, attribute)
        raise TypeError(f"{self}: the instance has no attribute {name!r}: add it, or override serialize()")

    def bind(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[dict[str, Any], tuple[tuple[Any, ...], dict[str, Any]]]:
        """Return the values by name, and those for `*args` and `**kwargs`; `TypeError` if they do not match."""
        if len(args) > len(self.names) and not self.extra:
            raise TypeError(f"{len(args)} positional arguments given, it takes {len(self.names)}")
        bound = dict(zip(self.names, args, strict=False))
        rest: dict[str, Any] = {}
        for given_name, value in kwargs.items():
            name = self.aliases.get(given_name, given_name)
            if name in bound:
                raise TypeError(f"argument {name!r} given twice")
            if name in self.parameters:
                bound[name] = value
            elif self.extra:
                rest[name] = value
            else:
                close = get_close_matches(name, self.names, n=1, cutoff=0.5)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise TypeError(f"unknown argument {name!r}{hint}")
        return bound, (tuple(args[len(self.names) :]), rest)

    def check_complete(self, bound: Mapping[str, Any]) -> None:
        missing = [p.name for p in self.parameters.values() if p.default is REQUIRED and p.name not in bound]
        if missing:
            plural = "s" if len(missing) > 1 else ""
            raise TypeError(f"missing argument{plural} {', '.join(map(repr, missing))}")

    def check(self, bound: dict[str, Any], rest: Any) -> Any:
        """Make the task from input of a user."""
        if self.model:  # as a whole, for its own validators
            everything = {**bound, **rest[1]}
            return validate_typed(self.cls.model_validate, self.cls.model_validate_json, everything)
        return self.construct({name: self.check_one(name, v) for name, v in bound.items()}, rest)

    def restore(self, name: str, value: Any) -> Any:
        """Convert a decoded value to the type of the parameter; return it unchanged if that fails."""
        parameter = self.parameters[name]
        if parameter.plain or value is None:
            return value
        if type(value) is parameter.annotation or parameter.adapter is None:
            return value
        try:
            restored = parameter.adapter.validate_python(value, strict=False, by_alias=True, by_name=True)
            # pydantic makes an Iterable[...] a generator, which could be read only once.
            return list(restored) if isinstance(restored, Iterator) else restored
        except Exception:
            nested = nested_dataclass(parameter.annotation)
            if nested is None or not isinstance(value, dict):
                return value
            # A nested dataclass with a value that does not match its annotation.
            signature = signature_of(nested)
            known = {name: signature.restore(name, value[name]) for name in signature.names if name in value}
            return signature.construct(known, {})

    def construct(self, values: dict[str, Any], rest: Any) -> Any:
        """Construct the task: with positional arguments as far as possible, a pydantic model by keyword."""
        more, keywords = rest or ((), {})
        if self.model:
            # Not cls(**values), which does not accept names of fields with an alias, and is strict in strict
            # models.
            return self.cls.model_validate({**values, **keywords}, strict=False, by_alias=True, by_name=True)
        positional: list[Any] = []
        by_name = dict(values)
        for parameter in self.parameters.values():
            if parameter.keyword_only:
                continue
            if parameter.name not in by_name:
                break
            positional.append(by_name.pop(parameter.name))
        return self.cls(*positional, *more, **by_name, **keywords)


_signatures: dict[type[Any], TaskSignature] = {}


def signature_of(cls: type[Any]) -> TaskSignature:
    """Return the signature of `cls`, made at the first call."""
    signature = _signatures.get(cls)
    if signature is None:
        signature = _signatures[cls] = _make_signature(cls)
    return signature


def _make_signature(cls: type[Any]) -> TaskSignature:
    init: Any = cls.__init__
    if hasattr(cls, "__pydantic_root_model__") and (  # only pydantic models have it
        not own_serialize(cls) or init.__module__.startswith("pydantic.")
    ):
        return TaskSignature(cls, of_model(cls), model=True, extra=cls.model_config.get("extra") == "allow")
    if own_serialize(cls) or not has_generated_init(cls):
        parameters, extra = of_init(cls)
        return TaskSignature(cls, parameters, model=False, extra=extra)
    return TaskSignature(cls, of_dataclass(cls), model=False, extra=False)


def own_serialize(cls: type[Any]) -> bool:
    """Return whether the class overrides `serialize`."""
    function = getattr(cls, "serialize", None)
    return function is not None and getattr(function, "__module__", "") != "diracx.tasks.plumbing.base_task"


#: Maximum number of combinations of layouts tried for a message of another version.
_MOST_LAYOUTS = 1000


def _hash(layouts: Sequence[str]) -> int:
    """Hash the layouts of fields to 32 bits; 0 for none."""
    return crc32(",".join(layouts).encode())
