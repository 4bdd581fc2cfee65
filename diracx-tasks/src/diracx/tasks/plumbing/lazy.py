"""Lazy imports: names that a module imports at their first use.

They save a second and 50 MB in modules of tasks, which a worker imports all. Types that only annotations use
(databases, settings, `Config`) are imported when the annotations are evaluated:

    if TYPE_CHECKING:
        from diracx.db.sql import JobDB
    else:
        __getattr__ = lazy_names(__name__, {"diracx.db.sql": ["JobDB"]})

Annotations must be strings (`from __future__ import annotations`). Function bodies must import what they use, as
Python does not call `__getattr__` for their globals.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy_names(module_name: str, names: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Make a `__getattr__` for a module that imports these names, each at its first use.

    Args:
        module_name: the module's `__name__`.
        names: module they come from (a relative one with its dots) -> names.
    """
    origins = {name: origin for origin, imported in names.items() for name in imported}

    def __getattr__(name: str) -> Any:
        if name not in origins:
            raise AttributeError(f"module {module_name!r} has no attribute {name!r}")
        module = sys.modules[module_name]
        value = getattr(import_module(origins[name], module.__package__), name)
        setattr(module, name, value)
        return value

    return __getattr__


class LazyScope(dict[str, Any]):
    """Namespace for the evaluation of annotations: globals of a module, including its lazy imports."""

    def __missing__(self, name: str) -> Any:
        lazily = self.get("__getattr__")
        if lazily is None or hasattr(builtins, name):
            raise KeyError(name)
        try:
            return lazily(name)
        except AttributeError:
            raise KeyError(name) from None
