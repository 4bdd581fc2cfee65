"""Serialise tasks to arguments, and rebuild them.

The fields of a task class are its arguments: those of a dataclass or a pydantic model, or the parameters of
the `__init__` of a plain class (each kept in an attribute of the same name, or of that name with an
underscore before it). A class that overrides `serialize` is rebuilt with `cls(*args)`.

What is known about a class is worked out once, at its first task. Fields of plain types are then handed over
as they come off the wire; for the others a pydantic `TypeAdapter` brings back what the wire flattened (nested
dataclasses and models, enums, paths). Python does not check a dataclass's annotations, so neither does
`rebuild`: a value that does not fit its annotation is handed over as it is. `typed_arguments`, for what
people type, does check. What would not arrive as it is, `roundtrip` refuses before it is sent.

No message about a class with secret fields shows what was given.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cached_property
from itertools import islice, product
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    NewType,
    TypeVar,
    get_args,
    get_origin,
)
from zlib import crc32

from .._util.secrets import MASK, hide
from ..exceptions import TaskArgumentsError
from .annotations import (
    UNKNOWN,
    annotates,
    globals_of,
    is_named_tuple,
    is_plain,
    layouts,
    nested_dataclass,
    resolve,
)
from .argument_texts import REQUIRED, one_line, reason, shown, type_text

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")


def field_names(cls: type[Any]) -> tuple[str, ...]:
    """Return the names of the arguments of `cls`, in the order in which `serialize` gives their values."""
    return signature_of(cls).names


def serialize(task: Any) -> tuple[Any, ...]:
    """Return the values of the task's fields, in their order.

    Raises `TypeError` if a plain class takes a parameter that it does not keep.
    """
    return signature_of(type(task)).values(task)


def rebuild(cls: type[T], args: Sequence[Any], kwargs: Mapping[str, Any], sig: int = 0) -> T:
    """Make the task from wire-decoded arguments.

    Args:
        sig: the signature of the class for which `args` were made, see `TaskSignature.signature`; 0: not known.

    Raises `TaskArgumentsError` if the class does not take them, or has other fields in their places.
    """
    shape = signature_of(cls)
    task: T
    try:
        if sig and not shape.has_signature(sig, len(args)):
            raise TypeError(
                "its arguments were made by a version of the class that has other fields, or the same in another "
                "order; run it with that version, or discard it and submit it anew"
            )
        if shape.all_plain and not kwargs and len(args) == len(shape.names):
            task = cls(*args)
            return task
        of_execute = execute_arguments(cls, kwargs)
        bound, rest = shape.bind(args, {name: v for name, v in kwargs.items() if name not in of_execute})
        task = shape.construct({name: shape.restore(name, v) for name, v in bound.items()}, rest)
        return task
    except (TypeError, ValueError) as exc:
        raise shape.refusal(exc, "", args, kwargs) from (None if shape.secret else exc)


def execute_arguments(cls: type[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that `execute` takes and the class does not: in version 0.7 it gets all keywords."""
    shape = signature_of(cls)
    theirs = inspect.signature(cls.execute).parameters if kwargs and not shape.extra else {}
    takes_all = any(each.kind is each.VAR_KEYWORD for each in theirs.values())
    of_class = {*shape.names, *shape.aliases}
    return {name: v for name, v in kwargs.items() if name not in of_class and (takes_all or name in theirs)}


def is_made_for(cls: type[Any], sig: int, count: int) -> bool:
    """Return whether the first `count` arguments of a message match the present fields of the class."""
    return not sig or signature_of(cls).has_signature(sig, count)


def secret_names(cls: type[Any]) -> frozenset[str]:
    """Return the secret fields: those the class declares, and those that hold pydantic's secrets."""
    return signature_of(cls).secret


def check_secret_fields(cls: type[Any]) -> None:
    """Check that the class has every field that it declares to be secret: a misspelt one would be shown.

    Raises:
        TypeError: it has not; the message names it.
    """
    shape = signature_of(cls)
    if shape.extra:  # any keyword may be one
        return
    annotated = {name for base in cls.__mro__ for name in vars(base).get("__annotations__", ())}
    undeclared = cls.secret_fields - shape.parameters.keys() - annotated
    if unknown := sorted(name for name in undeclared if not hasattr(cls, name)):
        raise TypeError(
            f"{cls.__module__}.{cls.__qualname__}: secret_fields names {', '.join(map(repr, unknown))}, and no "
            f"such field is there; it has {', '.join(shape.names) or 'none'}"
        )


def secret_positions(cls: type[Any]) -> list[int]:
    """Return the positions of the secret arguments.

    All that can be, where the class makes its arguments itself and none can be told from another.
    """
    shape = signature_of(cls)
    if not shape.secret:
        return []
    if shape.own_serialize:
        return list(range(max(64, len(shape.names))))
    return sorted(shape.secret_positions)


def knows_vo(cls: type[Any]) -> bool:
    """Return whether a task of this class may belong to a VO: it takes one, or has an `__init__` of its own."""
    shape = signature_of(cls)
    generated = shape.model or dataclasses.is_dataclass(cls) or not shape.names
    return "vo" in shape.names or shape.extra or hasattr(cls, "vo") or not generated


@dataclasses.dataclass
class Parameter:
    """One argument of a task class."""

    name: str
    annotation: Any  # with its Annotated metadata; UNKNOWN if there is none
    text: str  # the annotation as a reader knows it; empty if there is none
    default: Any = REQUIRED  # only its presence matters, and its repr in the signature
    keyword_only: bool = False
    alias: str | None = None  # the other name under which a pydantic model takes it
    secret: bool = False

    def __str__(self) -> str:
        text = f"{self.name}: {self.text}" if self.text else self.name
        if self.default is REQUIRED:
            return text
        return f"{text} = {MASK if self.secret else shown(self.default, 30)}"

    @cached_property
    def plain(self) -> bool:
        """True if decoding returns the value as it was, so that there is nothing to restore."""
        return self.annotation is UNKNOWN or is_plain(self.annotation)

    @cached_property
    def adapter(self) -> TypeAdapter[Any] | None:
        """The pydantic adapter of the annotation; None if pydantic can make nothing of it."""
        if self.annotation is UNKNOWN:
            return None
        from pydantic import ConfigDict, TypeAdapter

        # A type with a configuration of its own (model, dataclass) refuses one from outside.
        for config in (ConfigDict(arbitrary_types_allowed=True), None):
            try:
                return TypeAdapter(self.annotation, config=config)
            except Exception:  # noqa: S112 - any failure means the same: no adapter
                continue
        return None

    def restore(self, value: Any) -> Any:
        """Return the wire-decoded value as its annotation has it, or as it is where that does not fit."""
        if self.plain or value is None:
            return value
        if type(value) is self.annotation or self.adapter is None:
            return value
        try:
            restored = self.adapter.validate_python(value, strict=False, by_alias=True, by_name=True)
            # pydantic makes an Iterable[...] a generator, which could be read only once.
            return list(restored) if isinstance(restored, Iterator) else restored
        except Exception:
            nested = nested_dataclass(self.annotation)
            if nested is None or not isinstance(value, dict):
                return value
            # A nested dataclass with a value that its annotation does not allow: Python let it be made.
            shape = signature_of(nested)
            known = {name: shape.restore(name, value[name]) for name in shape.names if name in value}
            return shape.construct(known, {})

    def check(self, value: Any) -> Any:
        """Return a typed JSON value converted; `TypeError` if it does not fit."""
        if self.adapter is None:
            return value
        try:
            checked = _validate_typed(self.adapter.validate_python, self.adapter.validate_json, value)
            return list(checked) if isinstance(checked, Iterator) else checked
        except Exception as exc:
            if self.secret:
                raise TypeError(f"argument {self.name!r}: {reason(exc)}") from None
            raise TypeError(one_line(exc, f"argument {self.name!r}", value)) from exc


def _validate_typed(from_python: Callable[..., Any], from_json: Callable[..., Any], value: Any) -> Any:
    """Validate typed input with the two validators of a pydantic type."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):  # a Python value, from code rather than from a command line
        return from_python(value, by_alias=True, by_name=True)
    # In strict JSON mode "5" is no int, and yet "2026-01-01T00:00:00Z" is a datetime and a list a tuple.
    return from_json(text, strict=True, by_alias=True, by_name=True)


class TaskSignature:
    """Signature of a task class: its arguments and how to rebuild it."""

    def __init__(self, cls: type[Any], parameters: Sequence[Parameter], *, model: bool, extra: bool) -> None:
        self.cls = cls
        self.parameters = {parameter.name: parameter for parameter in parameters}
        self.names = tuple(self.parameters)
        self.aliases = {p.alias: p.name for p in parameters if p.alias}
        self.model = model  # a pydantic model: by keyword, and it validates for itself
        self.extra = extra  # takes *args or **kwargs
        self.all_plain = not model and all(p.plain and not p.keyword_only for p in parameters)
        declared: frozenset[str] = getattr(cls, "secret_fields", frozenset())
        classes = {p.name: list(_classes_in(p.annotation, set())) for p in parameters}
        self.secret = declared | {
            name for name, found in classes.items() if any(hasattr(cls, "get_secret_value") for cls in found)
        }
        self.secret_positions = frozenset(i for i, name in enumerate(self.names) if name in self.secret)
        for parameter in parameters:
            parameter.secret = parameter.name in self.secret
        # Whether the arguments alone decide whether the task arrives as it is: making it changes nothing.
        self.own_serialize = own_serialize(cls)
        self.verbatim = self.own_serialize or not (
            model
            or ((parameters or extra) and not _generated_init(_init_owner(cls)))
            or hasattr(cls, "__post_init__")
        )
        # Whether a task may be more than its arguments.
        self.holds_more = extra or any(
            (*getattr(cls, "__private_attributes__", ()), *(f for f in _dataclass_fields(cls) if not f.init))
        )
        self.plain_and_verbatim = self.verbatim and all(p.plain for p in parameters)
        self._layouts = [layouts(name, found) for name, found in classes.items()]
        self._signature = _hash([each[0] for each in self._layouts])

    def __str__(self) -> str:
        return f"{self.cls.__name__}({', '.join(map(str, self.parameters.values()))})"

    def signature(self, count: int) -> int:
        """A hash of the layouts of the first `count` fields, which travels with their values; 0 for none."""
        if count == len(self.names):
            return self._signature
        return _hash([each[0] for each in self._layouts[:count]])

    def has_signature(self, sig: int, count: int) -> bool:
        """Return whether it is theirs, or was before fields with defaults were added to their named tuples."""
        if sig == self.signature(count):
            return True
        earlier = islice(product(*self._layouts[:count]), _MOST_LAYOUTS)
        return any(sig == _hash(each) for each in earlier)

    def shown(self, value: Any) -> str:
        """Format a value for a message; of a class with secrets only its type."""
        return f"a value of type {type(value).__name__}" if self.secret else shown(value)

    def secret_values(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the secret arguments; all positional ones of a class that makes its own."""
        if not self.secret:
            return []
        every = self.own_serialize
        found = [value for position, value in enumerate(args) if every or position in self.secret_positions]
        return found + [value for name, value in kwargs.items() if self.aliases.get(name, name) in self.secret]

    def refusal(
        self, exc: Exception, prefix: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> TaskArgumentsError:
        """Make the error that says why the class does not take these values."""
        from pydantic import ValidationError

        if not self.secret:
            return TaskArgumentsError(f"{self}: {one_line(exc, prefix)}")
        if isinstance(exc, ValidationError):
            place = ".".join(str(part) for part in exc.errors(include_url=False, include_input=False)[0]["loc"])
            return TaskArgumentsError(f"{self}: {f'argument {place!r}: ' if place else ''}{reason(exc)}")
        # Words of the class itself, which may quote what it was given.
        return TaskArgumentsError(f"{self}: {hide(one_line(exc), self.secret_values(args, kwargs))}")

    def check_one(self, name: str, value: Any) -> Any:
        return self.parameters[name].check(value)

    def values(self, task: Any) -> tuple[Any, ...]:
        try:
            return tuple([getattr(task, name) for name in self.names])
        except AttributeError:
            return tuple(self._kept(task, name) for name in self.names)

    def _kept(self, task: Any, name: str) -> Any:
        for attribute in (name, f"_{name}"):
            if hasattr(task, attribute):
                return getattr(task, attribute)
        raise TypeError(f"{self}: the instance keeps no attribute {name!r}: add it, or override serialize()")

    def bind(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[dict[str, Any], tuple[tuple[Any, ...], dict[str, Any]]]:
        """Return the values by name, and what goes into `*args` and `**kwargs`; `TypeError` if they clash."""
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
        """Return the task made from typed input."""
        if self.model:  # as a whole, so that its own validators see what was typed
            everything = {**bound, **rest[1]}
            return _validate_typed(self.cls.model_validate, self.cls.model_validate_json, everything)
        return self.construct({name: self.check_one(name, v) for name, v in bound.items()}, rest)

    def restore(self, name: str, value: Any) -> Any:
        return self.parameters[name].restore(value)

    def construct(self, values: dict[str, Any], rest: Any) -> Any:
        """Construct the task: positionally as far as possible, a pydantic model by keyword."""
        more, keywords = rest or ((), {})
        if self.model:
            # Not cls(**values): a field with an alias would not be found under its name, and a strict model
            # would refuse what the wire flattened.
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


_shapes: dict[type[Any], TaskSignature] = {}


def signature_of(cls: type[Any]) -> TaskSignature:
    """Return the signature of `cls`, made at the first call."""
    shape = _shapes.get(cls)
    if shape is None:
        shape = _shapes[cls] = _work_out(cls)
    return shape


def _work_out(cls: type[Any]) -> TaskSignature:
    init: Any = cls.__init__
    if hasattr(cls, "__pydantic_root_model__") and (  # every pydantic model has it, and nothing else
        not own_serialize(cls) or init.__module__.startswith("pydantic.")
    ):
        return TaskSignature(cls, _of_model(cls), model=True, extra=cls.model_config.get("extra") == "allow")
    if own_serialize(cls) or not _generated_init(_init_owner(cls)):
        parameters, extra = _of_init(cls)
        return TaskSignature(cls, parameters, model=False, extra=extra)
    return TaskSignature(cls, _of_dataclass(cls), model=False, extra=False)


def own_serialize(cls: type[Any]) -> bool:
    """Return whether the class overrides `serialize`."""
    function = getattr(cls, "serialize", None)
    return function is not None and getattr(function, "__module__", "") != "diracx.tasks.plumbing.base_task"


def _init_owner(cls: type[Any]) -> type[Any]:
    return next((base for base in cls.__mro__ if "__init__" in vars(base)), object)


def _dataclass_fields(cls: type[Any]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()


#: Combinations of layouts that are tried for a message of another version.
_MOST_LAYOUTS = 1000


def _hash(layouts: Sequence[str]) -> int:
    """Hash the layouts of fields to 32 bits; 0 for none."""
    return crc32(",".join(layouts).encode())


def _classes_in(annotation: Any, seen: set[Any]) -> Iterator[type[Any]]:
    """Yield the classes that values of this type are made of, at any depth, each of them once."""
    if isinstance(annotation, NewType):
        annotation = annotation.__supertype__
    for part in get_args(annotation):
        yield from _classes_in(part, seen)
    cls = get_origin(annotation) or annotation
    if not isinstance(cls, type) or cls in seen:
        return
    seen.add(cls)
    yield cls
    parts: list[Any] = []
    if hasattr(cls, "__pydantic_root_model__"):
        parts = [parameter.annotation for parameter in _of_model(cls)]
    elif dataclasses.is_dataclass(cls):
        parts = [parameter.annotation for parameter in _of_dataclass(cls, nested=True)]
    elif is_named_tuple(cls):
        parts = [resolve(each, globals_of(cls), {}) for each in vars(cls).get("__annotations__", {}).values()]
    for part in parts:
        yield from _classes_in(part, seen)


def _generated_init(owner: type[Any]) -> bool:
    """Return whether the `__init__` that `owner` defines was written by `@dataclass`."""
    parameters = vars(owner).get("__dataclass_params__")
    return parameters is not None and parameters.init


def _of_model(cls: type[Any]) -> list[Parameter]:
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


def _of_dataclass(cls: type[Any], *, nested: bool = False) -> list[Parameter]:
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
            raise TypeError(f"{cls.__name__} takes {name!r} and does not keep it: override serialize()")
    return found


def _of_init(cls: type[Any]) -> tuple[list[Parameter], bool]:
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
