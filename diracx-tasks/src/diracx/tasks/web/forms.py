"""Parses HTML forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .operator import NotPossibleError


@dataclass(frozen=True, slots=True)
class Form:
    """Fields of a submitted form."""

    fields: Mapping[str, Sequence[str]]

    def one(self, name: str, default: str = "") -> str:
        """Return the first value of a field."""
        return next(iter(self.fields.get(name, ())), default)

    def many(self, name: str) -> list[str]:
        """Return all values of a field, without duplicates."""
        return list(dict.fromkeys(self.fields.get(name, ())))

    def numbers(self, name: str) -> list[int]:
        """Return all values of a numeric field, without duplicates."""
        return [integer(text) for text in self.many(name)]


def integer(text: str, least: int = 0, most: int = 2**63 - 1) -> int:
    """Parse a number; raise NotPossibleError if it is out of bounds."""
    if not (text.isascii() and text.isdecimal()) or not least <= int(text[:20]) <= most:
        raise NotPossibleError(f"{text[:40]!r} is not a number from {least} to {most}")
    return int(text)
