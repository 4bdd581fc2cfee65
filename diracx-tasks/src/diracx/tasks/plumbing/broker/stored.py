"""Numbers, moments and texts as the server has them: reading them never fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

#: What is shown in place of what cannot be read.
UNDECODABLE = "(cannot be decoded)"
#: Fields or members that one command reads, however many there are: well below a ms of the server's time.
SCANNED = 500
#: Digits of a time in µs, until long after the calendar's end.
_LONGEST_NUMBER = 18
#: The last whole second of the calendar (s since the epoch).
_LAST_SECOND = 253_402_300_799


class UnreadableKeyError(ValueError):
    """A key holds what this version of the task system has not written. The message names it."""


@contextmanager
def reading(key: str) -> Iterator[None]:
    """Name the key in whatever goes wrong while what it holds is taken apart.

    Raises:
        UnreadableKeyError: in place of the error of a decoder, or of a field that is missing or of another type.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UnreadableKeyError(
            f"the key {key!r} holds what this version cannot read ({type(error).__name__}): another version of "
            "the task system, or something else, writes to it"
        ) from error


def number_of(value: bytes | str | None) -> int:
    """A number that a script has written; 0 for anything else."""
    return int(value) if value is not None and len(value) <= _LONGEST_NUMBER and value.isdigit() else 0


def moment_of(seconds: float) -> datetime:
    """The moment so many seconds since the epoch; one within the calendar, whatever the number is."""
    if not seconds > 0:  # and not a number
        seconds = 0
    return datetime.fromtimestamp(min(seconds, _LAST_SECOND), UTC)


def ms_of(score: bytes | str) -> int:
    """A score of a sorted set that is a time (ms since the epoch); one within the calendar, infinity included."""
    return int(max(0.0, min(float(score), _LAST_SECOND * 1000)))


def text_of(value: Any) -> str:
    """Decode a reply of the server to text."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def printable(text: str) -> str:
    """The text as every encoding takes it: halves of surrogate pairs are written out."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
