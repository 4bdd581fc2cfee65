"""Resolves task names: full registry names, or class names alone."""

from __future__ import annotations

from collections.abc import Collection


class AmbiguousTaskNameError(ValueError):
    """Several categories have a class of this name; the message lists them."""


def resolve_task_name(name: str, known: Collection[str]) -> str | None:
    """Return the registry name (`category:ClassName`) of a full name or a class name; None if unknown.

    Resolves ids of schedules, which begin with such a name, too.

    Args:
        name: as entered by a user.
        known: registry names.

    Raises:
        AmbiguousTaskNameError: a class name matches several.
    """
    if name in known:
        return name
    found = sorted(each for each in set(known) if each.partition(":")[2] == name)
    if len(found) > 1:
        raise AmbiguousTaskNameError(f"{name!r} is ambiguous; write {' or '.join(found)}")
    return found[0] if found else None
