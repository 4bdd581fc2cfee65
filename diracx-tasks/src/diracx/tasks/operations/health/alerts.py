"""Alerts of health checks, and their severity."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from ...plumbing._util.printable import printable_line
from ..models import ReadModel


class Severity(StrEnum):
    """Severity of an alert, with the terms of Nagios."""

    OK = "ok"
    WARNING = "warning"
    """An operation is slow, or has failed and is over."""
    CRITICAL = "critical"
    """An operation that should happen does not."""
    UNKNOWN = "unknown"
    """A check could not be run."""

    @property
    def exit_code(self) -> int:
        """Exit code of a Nagios check: 0 to 3."""
        return list(Severity).index(self)

    @property
    def rank(self) -> int:
        """Rank for sorting; unknown ranks between warning and critical."""
        return _WORST_LAST.index(self)


_WORST_LAST = (Severity.OK, Severity.WARNING, Severity.UNKNOWN, Severity.CRITICAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert(ReadModel):
    """Problem found by a health check."""

    check: str = ""
    """Name of the health check: `queue_without_worker`."""
    severity: Severity
    summary: str
    """Problem, on one line."""
    remedy: str
    """Remedy, on one line."""
    count: int = 1
    """Number of affected tasks, workers, pilots, …"""
    subject: str = ""
    """Affected queue, worker, task, compute element, …; empty: the whole system."""
    since: datetime | None = None
    """Start of the problem: from the data, else when it was first noticed; None if unknown."""
    public: bool = False
    """True if members of VOs may see it in full: it names no task, lock or site."""
    path: str = "/"
    """Page of the dashboard with details."""

    def __post_init__(self) -> None:
        # It may quote names and errors with control sequences.
        object.__setattr__(self, "summary", printable_line(self.summary))


def counted(number: int, one: str, many: str) -> str:
    """Format a number with its noun: `1 task waits`, `1,204 tasks wait`."""
    return f"{number:,} {one if number == 1 else many}"
