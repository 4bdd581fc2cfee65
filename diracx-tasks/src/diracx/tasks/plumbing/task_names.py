"""Resolve task names: the full registry name, or the class name alone."""

from __future__ import annotations

from collections.abc import Iterable


class AmbiguousTaskNameError(ValueError):
    """Several categories have a class of this name; the message lists them."""


def resolve_task_name(name: str, known: Iterable[str]) -> str | None:
    """Return the registry name (`category:ClassName`) of a full name or a class name alone.

    Ids of schedules, which begin with such a name, are resolved likewise.

    Args:
        name: as it was typed.
        known: registry names to choose from.

    Returns:
        None when none of them fits.

    Raises:
        AmbiguousTaskNameError: when a class name fits several.
    """
    names = set(known)
    if name in names:
        return name
    found = sorted(each for each in names if each.partition(":")[2] == name)
    if len(found) > 1:
        raise AmbiguousTaskNameError(f"{name!r} names several tasks; write {' or '.join(found)}")
    return found[0] if found else None
