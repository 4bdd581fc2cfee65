"""Forms that browsers send."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .operator import NotPossibleError


@dataclass(frozen=True, slots=True)
class Form:
    """The fields of a form."""

    fields: Mapping[str, Sequence[str]]

    def one(self, name: str, default: str = "") -> str:
        """The first value of a field."""
        return next(iter(self.fields.get(name, ())), default)

    def many(self, name: str) -> list[str]:
        """All values of a field, each once."""
        return list(dict.fromkeys(self.fields.get(name, ())))

    def numbers(self, name: str) -> list[int]:
        """The same, of a field of numbers.

        Raises:
            NotPossibleError: one of them is none.
        """
        return [integer(text) for text in self.many(name)]


def integer(text: str, least: int = 0, most: int = 2**63 - 1) -> int:
    """A number that was typed.

    Raises:
        NotPossibleError: it is none, or out of range.
    """
    if not (text.isascii() and text.isdecimal()) or not least <= int(text[:20]) <= most:
        raise NotPossibleError(f"{text[:40]!r} is no number from {least} to {most}")
    return int(text)
