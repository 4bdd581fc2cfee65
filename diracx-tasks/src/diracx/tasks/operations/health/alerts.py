"""Results of the health checks."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from ...plumbing._util.printable import printable_line
from ..models import Shown


class Severity(StrEnum):
    """Severity of an alert, in the words of Nagios."""

    OK = "ok"
    WARNING = "warning"
    """An operation is slow, or has failed and is over."""
    CRITICAL = "critical"
    """An operation that should happen does not."""
    UNKNOWN = "unknown"
    """A check could not be made."""

    @property
    def exit_code(self) -> int:
        """0 to 3, as Nagios has them."""
        return list(Severity).index(self)

    @property
    def rank(self) -> int:
        """Greater is worse: what could not be seen may be worse than a warning."""
        return _WORST_LAST.index(self)


_WORST_LAST = (Severity.OK, Severity.WARNING, Severity.UNKNOWN, Severity.CRITICAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert(Shown):
    """A problem that operators should know of."""

    check: str = ""
    """Name of the health check: `queue_without_worker`."""
    severity: Severity
    summary: str
    """Problem, on one line."""
    remedy: str
    """Remedy, on one line."""
    count: int = 1
    """Number of tasks, workers, pilots, … that it is about."""
    subject: str = ""
    """Queue, worker, task, compute element, … that it is about; empty: the whole system."""
    since: datetime | None = None
    """Since when it is so: by the data, else since it was first noticed; None where that is not known."""
    public: bool = False
    """True if those who see the numbers of the installation may see it whole: it names no task, lock or site."""
    path: str = "/"
    """The page of the dashboard that has more about it."""

    def __post_init__(self) -> None:
        # Names and errors come from anywhere, and an alert goes to terminals, pages, logs and mails.
        object.__setattr__(self, "summary", printable_line(self.summary))


def worst(alerts: list[Alert]) -> Severity:
    """The severity of the whole."""
    return max((alert.severity for alert in alerts), key=lambda each: each.rank, default=Severity.OK)


def counted(number: int, one: str, many: str) -> str:
    """`1 task waits`, `1,204 tasks wait`."""
    return f"{number:,} {one if number == 1 else many}"
