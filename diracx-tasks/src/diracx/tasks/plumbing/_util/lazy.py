"""Lazy imports: names that a module imports at their first use.

For modules with tasks this is worth a second and 50 MB: a worker imports them all, whatever it will execute. What
only a signature names (databases, settings, `Config`) is needed when the signature is looked at:

    if TYPE_CHECKING:
        from diracx.db.sql import JobDB
    else:
        __getattr__ = lazy_names(__name__, {"diracx.db.sql": ["JobDB"]})

Annotations must be strings for that (`from __future__ import annotations`), and the body of a function, for which
Python does not ask `__getattr__`, imports what it uses by itself.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

__all__ = ["lazy_names"]


def lazy_names(module_name: str, names: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Make a `__getattr__` for a module that imports these names, each at its first use.

    Args:
        module_name: the module's `__name__`.
        names: module they come from (a relative one with its dots) -> names.
    """
    homes = {name: home for home, from_there in names.items() for name in from_there}

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module_name!r} has no attribute {name!r}")
        module = sys.modules[module_name]
        value = getattr(import_module(homes[name], module.__package__), name)
        setattr(module, name, value)
        return value

    return __getattr__


class LazyScope(dict[str, Any]):
    """Scope to evaluate annotations in: the globals of a module, and the names that it imports lazily."""

    def __missing__(self, name: str) -> Any:
        lazily = self.get("__getattr__")
        if lazily is None or hasattr(builtins, name):
            raise KeyError(name)
        try:
            return lazily(name)
        except AttributeError:
            raise KeyError(name) from None
