"""The DiracX sentinels: class methods that stand for a dependency until an override replaces them.

``JobDB.transaction`` is never called: it identifies "a JobDB in a transaction". The application factory of
``diracx.routers`` and `setup_dependency_overrides` provide the override at run time.
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
    """The subclasses of one DiracX base class, and those of their class methods that are sentinels."""

    module: str
    base: str
    methods: tuple[str, ...]

    def has(self, cls: type) -> bool:
        """True if `cls` derives from the base. Does not import the base's module.

        No class can derive from a base that was not imported, and importing ``diracx.db`` takes a second.
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
    """Return the family of the sentinel `call`; None for any other callable."""
    owner = getattr(call, "__self__", None)
    if inspect.isclass(owner):
        for family in FAMILIES:
            if call.__name__ in family.methods and family.has(owner):
                return family
    return None


def sentinel_name(call: Call) -> str | None:
    """Return the name of a sentinel that needs an override, such as ``JobDB.transaction``; else None.

    Some settings classes define a `create` that works without one. So does ``ConfigSource.create``, which needs
    one all the same, as it returns the source and not the configuration.
    """
    family = family_of(call)
    if family is None:
        return None
    inherited = getattr(sys.modules[family.module], family.base).__dict__[call.__name__].__func__
    if family is not CONFIG and getattr(call, "__func__", None) is not inherited:
        return None
    return name_of(call)


def name_of(call: Call) -> str:
    """Return the name of a callable for messages: ``JobDB.transaction``, although ``BaseSQLDB`` defines it."""
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


def is_async(call: Call) -> bool:
    """True for a coroutine function, decorated or not, and for one that calls another function."""
    return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(innermost(call))


def calls_below(dependant: Any, overrides: Overrides, *, required: bool = False) -> Iterator[Call]:
    """Iterate over the calls in the tree below `dependant` (a `Plan` or a FastAPI ``Dependant``).

    Dependencies of an overridden call are skipped, as they are not needed; with `required`, so are optional ones.
    """
    for child in dependant.dependencies:
        if required and child.optional:
            continue
        yield child.call
        if child.call not in overrides:
            yield from calls_below(child, overrides, required=required)


def find_missing_overrides(dependant: Any, overrides: Overrides) -> list[str]:
    """List the sentinels in the tree of a `Plan` (or FastAPI ``Dependant``) that have no override.

    Returns their names in the code (``JobDB.transaction``), each once, in the order of the tree.
    """
    return list(dict.fromkeys(_missing(dependant, overrides)))


def _missing(dependant: Any, overrides: Overrides) -> Iterator[str]:
    for child in dependant.dependencies:
        if child.call in overrides:
            continue
        name = sentinel_name(child.call)
        if name is not None and not getattr(child, "optional", False):
            yield name
        yield from _missing(child, overrides)
