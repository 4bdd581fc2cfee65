"""What health checks find."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from ...plumbing._util.printable import printable_line
from ..models import Shown, Snapshot
from ..visibility import Viewer


class Severity(StrEnum):
    """How bad it is, in the words of Nagios."""

    OK = "ok"
    WARNING = "warning"
    """Something is slow, or has failed and is over."""
    CRITICAL = "critical"
    """Something does not happen that should."""
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
    """Something an operator should know."""

    check: str
    """Name of the health check: `queue_without_worker`."""
    severity: Severity
    summary: str
    """What is so, on one line."""
    remedy: str
    """What to do about it, on one line."""
    count: int = 1
    """How many tasks, workers, pilots, … it is about."""
    subject: str = ""
    """Which queue, worker, task, compute element, … it is about; empty: the whole system."""
    since: datetime | None = None
    """Since when it is so: by the data, else since it was first noticed; None where that is not known."""
    public: bool = False
    """Whether whoever may see the numbers of the installation may see it whole: it names no task, lock or site."""
    path: str = "/"
    """The page of the dashboard that has more about it."""

    def __post_init__(self) -> None:
        # Names and errors come from anywhere, and an alert goes to terminals, pages, logs and mails.
        object.__setattr__(self, "summary", printable_line(self.summary))


@dataclass(frozen=True, slots=True, kw_only=True)
class Health(Shown):
    """What all health checks found at one moment."""

    severity: Severity
    """The worst there is."""
    alerts: list[Alert] = field(default_factory=list)
    """The worst first."""
    unchecked: list[str] = field(default_factory=list)
    """What is not looked at from here, and why."""
    snapshot: Snapshot | None = None
    """The whole system; None when the server did not answer."""
    error: Exception | None = None
    """Why it did not."""

    def for_viewer(self, viewer: Viewer) -> Health:
        """As far as a viewer may see it: of what concerns other VOs only that it is so."""
        if viewer.vo is None:
            return self
        shown = [alert for alert in self.alerts if alert.public]
        private: dict[tuple[str, Severity], list[Alert]] = {}
        for alert in self.alerts:
            if not alert.public:
                private.setdefault((alert.check, alert.severity), []).append(alert)
        for (check, severity), these in private.items():
            shown.append(
                Alert(
                    check=check,
                    severity=severity,
                    summary=_describe(check),
                    remedy="administrators see which, and what to do",
                    count=len(these),
                    since=min((each.since for each in these if each.since is not None), default=None),
                )
            )
        shown.sort(key=lambda alert: -alert.severity.rank)
        snapshot = None if self.snapshot is None else viewer.snapshot(self.snapshot)
        return replace(self, alerts=shown, snapshot=snapshot, unchecked=[])

    def names(self) -> list[str]:
        """`{severity} {check}` of each alert, once: for those who may not see more."""
        return list(dict.fromkeys(f"{alert.severity} {alert.check}" for alert in self.alerts))

    def as_json(self) -> dict[str, Any]:
        """For `json.dumps`: the alerts, beside the fields of the snapshot."""
        return {
            **({} if self.snapshot is None else self.snapshot.as_json()),
            "severity": str(self.severity),
            "alerts": [alert.as_json() for alert in self.alerts],
            "unchecked": self.unchecked,
        }


def _describe(check: str) -> str:
    from .checks import describe

    return describe(check)


def worst(alerts: list[Alert]) -> Severity:
    """The severity of the whole."""
    return max((alert.severity for alert in alerts), key=lambda each: each.rank, default=Severity.OK)


def counted(number: int, one: str, many: str) -> str:
    """`1 task waits`, `1,204 tasks wait`."""
    return f"{number:,} {one if number == 1 else many}"
