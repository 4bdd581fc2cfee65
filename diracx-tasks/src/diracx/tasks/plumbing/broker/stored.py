"""Parses stored numbers, times and texts; most of these functions never fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter

_Value = TypeVar("_Value")
_adapter: Any = cache(TypeAdapter)

#: Text shown instead of an unreadable value.
UNDECODABLE = "(cannot be decoded)"
#: Fields or members that one command reads: well below 1 ms of the server's time.
SCANNED = 500
#: Longest number in digits: enough for a time in µs long after the year 9999.
_LONGEST_NUMBER = 18
#: The last second that `datetime` can represent (s since the epoch).
_LAST_SECOND = 253_402_300_799


class UnreadableKeyError(ValueError):
    """The value of a key cannot be parsed. The message names the key."""


@contextmanager
def reading(key: str) -> Iterator[None]:
    """Convert parse errors in the block into errors that name the key.

    Raises:
        UnreadableKeyError: instead of a decoding error, or of a missing field or one of the wrong type.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise UnreadableKeyError(
            f"the key {key!r} holds what this version cannot read ({type(error).__name__}): another version of "
            "the task system, or something else, writes to it"
        ) from error


def typed(kind: type[_Value], stored: Any) -> _Value:
    """Convert stored fields to a dataclass; ignores fields that it does not have.

    Raises:
        ValueError: a field is missing or of another type.
    """
    value: _Value = _adapter(kind).validate_python(stored)
    return value


def number_of(value: bytes | str | None) -> int:
    """Parse a number that a script has written; 0 for any other value."""
    return int(value) if value and len(value) <= _LONGEST_NUMBER and value.isascii() and value.isdigit() else 0


def moment_of(seconds: float) -> datetime:
    """Time at `seconds` since the epoch, limited to the range of `datetime`."""
    if not seconds > 0:  # also for NaN
        seconds = 0
    return datetime.fromtimestamp(min(seconds, _LAST_SECOND), UTC)


def ms_of(score: bytes | str) -> int:
    """Parse a score that is a time (ms since the epoch), limited to the range of `datetime`; accepts infinity."""
    return int(max(0.0, min(float(score), _LAST_SECOND * 1000)))


def text_of(value: Any) -> str:
    """Decode a reply of the server to text."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def printable(text: str) -> str:
    """Replace lone surrogates by escapes, so that every encoding accepts the text."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
