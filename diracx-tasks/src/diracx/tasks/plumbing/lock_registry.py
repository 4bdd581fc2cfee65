"""Registry of the types of lockable objects.

A type must be registered before it is used, so that a misspelt one is refused instead of making another lock. The
modules of extensions in the entry-point group `diracx.lock_object_types` register their types when they are
imported.
"""

from __future__ import annotations

from typing import Self

from .plugins import load_plugin

ENTRY_POINT_GROUP = "diracx.lock_object_types"
_registered: set[str] = set()


class LockedObjectType(str):
    """A registered object type; a `str`.

    Raises:
        ValueError: the type is not registered; lists the registered ones.
    """

    __slots__ = ()

    def __new__(cls, value: str) -> Self:
        if value not in _registered:
            known = ", ".join(sorted(_registered))
            raise ValueError(
                f"Unknown LockedObjectType {value!r} (known: {known}); "
                "register it with register_locked_object_type()"
            )
        return super().__new__(cls, value)


def register_locked_object_type(name: str) -> LockedObjectType:
    """Register an object type, and return it. Idempotent.

    Raises:
        ValueError: the name is empty or has a colon, which separates the parts of a Redis key.
    """
    if not name or ":" in name:
        raise ValueError(f"a lock object type must be a non-empty name without ':', not {name!r}")
    _registered.add(name)
    return LockedObjectType(name)


def locked_object_types() -> frozenset[str]:
    """Return all registered object types."""
    return frozenset(_registered)


TASK = register_locked_object_type("task")
JOB = register_locked_object_type("job")
TRANSFORMATION = register_locked_object_type("transformation")


def validate_registry() -> None:
    """Import all modules of the entry-point group `diracx.lock_object_types`.

    Raises:
        RuntimeError: names the entry point of a module that cannot be imported.
    """
    from importlib.metadata import entry_points

    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            load_plugin(entry_point.load)
        except Exception as error:
            raise RuntimeError(
                f"lock object types {entry_point.name!r} ({entry_point.value}) cannot be loaded: {error}"
            ) from error
