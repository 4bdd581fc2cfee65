"""Formats values for operators, on terminal and dashboard."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

#: Text in place of a missing value.
NONE = "-"


def plain(value: Any) -> str:
    """Format a value by its type."""
    if value is None or value in ("", [], ()):
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    return ", ".join(value) if isinstance(value, list | tuple) else str(value)


def number(value: float | None) -> str:
    """Format a number or rate: `12,345`, `0.25`, `0.003`."""
    if value is None:
        return NONE
    if 0 < value < 0.005:
        return f"{value:.1g}"
    return f"{value:,.2f}" if isinstance(value, float) and value < 10 else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """Format a duration: `0.4 s`, `12 s`, `3 min`, `5.1 h`, `2.0 d`."""
    if seconds is None:
        return NONE
    seconds = max(0.0, seconds)
    for length, unit in ((86400, "d"), (3600, "h")):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    if seconds >= 120:
        return f"{seconds / 60:.0f} min"
    if seconds >= 10:
        return f"{seconds:.0f} s"
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{seconds * 1000:.0f} ms"


def since(moment: datetime | None) -> str:
    """Format the time since a moment."""
    return NONE if moment is None else duration((datetime.now(UTC) - moment).total_seconds())


def remaining(moment: datetime | None) -> str:
    """Format the time until a moment."""
    return NONE if moment is None else f"in {duration((moment - datetime.now(UTC)).total_seconds())}"


def size(number_of_bytes: float | None) -> str:
    """Format a number of bytes: `12 MB`."""
    if number_of_bytes is None:
        return NONE
    amount = float(number_of_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 999.5:
            return f"{amount:.0f} {unit}" if unit == "B" or amount >= 9.95 else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def percent(share: float | None) -> str:
    """Format a share between 0 and 1: `12.5%`, `100%`."""
    if share is None:
        return NONE
    return f"{share:.0%}" if share in (0, 1) else f"{share:.1%}"
