"""The DiracX sentinels: class methods that stand for a dependency until an override replaces them.

``JobDB.transaction`` is no function to call but the name of "a JobDB in a transaction"; the application
factory of ``diracx.routers`` and `setup_dependency_overrides` say what it is at run time.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

Call: TypeAlias = Callable[..., Any]
Overrides: TypeAlias = Mapping[Call, Call]


class Family(NamedTuple):
    """The classes below one DiracX base class, and which of their class methods are sentinels."""

    module: str
    base: str
    methods: tuple[str, ...]

    def has(self, cls: type) -> bool:
        """Say whether `cls` derives from the base, without importing its module.

        A class cannot derive from something that was never imported, and ``diracx.db`` alone takes a second.
        """
        base = getattr(sys.modules.get(self.module), self.base, None)
        return base is not None and issubclass(cls, base)


SQL = Family("diracx.db.sql.utils", "BaseSQLDB", ("transaction", "no_transaction"))
OPENSEARCH = Family("diracx.db.os.utils", "BaseOSDB", ("session",))
SETTINGS = Family("diracx.core.settings", "ServiceSettingsBase", ("create",))
CONFIG = Family("diracx.core.config", "ConfigSource", ("create",))
SOURCE = Family("diracx.core.sources", "AsyncCacheableSource", ("create",))
FAMILIES = (SQL, OPENSEARCH, SETTINGS, CONFIG, SOURCE)


def family_of(call: Call) -> Family | None:
    """Return the family of classes that `call` is a sentinel of, if it is one."""
    owner = getattr(call, "__self__", None)
    if inspect.isclass(owner):
        for family in FAMILIES:
            if call.__name__ in family.methods and family.has(owner):
                return family
    return None


def sentinel_name(call: Call) -> str | None:
    """Return ``JobDB.transaction`` or the like where `call` is a sentinel that needs an override.

    Some settings classes bring a `create` of their own that works without one. So does
    ``ConfigSource.create``, but what it makes is the source and not the configuration.
    """
    family = family_of(call)
    if family is None:
        return None
    inherited = getattr(sys.modules[family.module], family.base).__dict__[call.__name__].__func__
    if family is not CONFIG and getattr(call, "__func__", None) is not inherited:
        return None
    return name_of(call)


def name_of(call: Call) -> str:
    """Return what messages call a callable: ``JobDB.transaction``, although ``BaseSQLDB`` defines it."""
    owner = getattr(call, "__self__", None)
    if inspect.isclass(owner):
        return f"{owner.__name__}.{call.__name__}"
    inner = innermost(call)
    return str(getattr(inner, "__qualname__", inner))


def innermost(call: Call) -> Call:
    """Return the function or class behind partials, decorators and callable objects."""
    current: Any = call
    while True:
        if isinstance(current, functools.partial):
            current = current.func
        elif hasattr(current, "__wrapped__"):
            current = current.__wrapped__
        elif inspect.isroutine(current) or inspect.isclass(current):
            return current
        else:
            current = type(current).__call__


def calls_below(dependant: Any, overrides: Overrides, *, required: bool = False) -> Iterator[Call]:
    """Walk the calls in the tree below `dependant` (a `Plan` or a FastAPI ``Dependant``).

    What stands below an overridden call is not visited: nothing asks for it any more. With `required`, what is
    optional is not, either.
    """
    for child in dependant.dependencies:
        if required and child.optional:
            continue
        yield child.call
        if child.call not in overrides:
            yield from calls_below(child, overrides, required=required)


def find_missing_overrides(dependant: Any, overrides: Overrides) -> list[str]:
    """Name the sentinels in the tree of a `Plan` (or FastAPI ``Dependant``) that have no override.

    The names are those of the code (``JobDB.transaction``), each once, in the order met.
    """
    return list(dict.fromkeys(_missing(dependant, overrides)))


def _missing(dependant: Any, overrides: Overrides) -> Iterator[str]:
    for child in dependant.dependencies:
        if child.call in overrides:
            continue
        name = sentinel_name(child.call)
        if name is not None and not getattr(child, "optional", False):  # an optional one is done without
            yield name
        yield from _missing(child, overrides)
