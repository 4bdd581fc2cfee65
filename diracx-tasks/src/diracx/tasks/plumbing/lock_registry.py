"""Registry of the kinds of lockable objects. Extensions add theirs at import time.

A kind must be registered before it is used, so that a typing error in a lock key is refused at once
and does not silently create a second, useless lock. An extension names a module in the entry-point
group `diracx.lock_object_types`; importing it registers its kinds.
"""

from __future__ import annotations

from typing import Self

ENTRY_POINT_GROUP = "diracx.lock_object_types"
_registered: set[str] = set()


class LockedObjectType(str):
    """A registered kind of lockable object, usable wherever a `str` is.

    Raises:
        ValueError: when the kind was never registered; the message lists those that were.
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
    """Register a kind of lockable object and return it. Registering twice is harmless.

    Raises:
        ValueError: when the name is empty or has a colon, which separates the parts of a Redis key.
    """
    if not name or ":" in name:
        raise ValueError(f"a lock object type must be a non-empty name without ':', not {name!r}")
    _registered.add(name)
    return LockedObjectType(name)


def locked_object_types() -> frozenset[str]:
    """Return all registered kinds."""
    return frozenset(_registered)


TASK = register_locked_object_type("task")
JOB = register_locked_object_type("job")
TRANSFORMATION = register_locked_object_type("transformation")


def validate_registry() -> None:
    """Import every module named in `diracx.lock_object_types`, so that all kinds are known.

    Raises:
        RuntimeError: when a module cannot be imported, naming the entry point.
    """
    from importlib.metadata import entry_points

    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry_point.load()
        except Exception as error:
            raise RuntimeError(
                f"lock object types {entry_point.name!r} ({entry_point.value}) cannot be loaded: {error}"
            ) from error
