"""The result of all health checks, and what a viewer may see of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ..models import Shown, Snapshot
from ..visibility import Viewer
from .alerts import Alert, Severity
from .checks import describe


@dataclass(frozen=True, slots=True, kw_only=True)
class Health(Shown):
    """Result of all health checks at one moment."""

    severity: Severity
    """The worst there is."""
    alerts: list[Alert] = field(default_factory=list)
    """The worst first."""
    unchecked: list[str] = field(default_factory=list)
    """Checks that cannot be run from here, each with the reason."""
    snapshot: Snapshot | None = None
    """The whole system; None when the server did not answer."""
    error: Exception | None = None
    """Error with which the server did not answer."""

    def for_viewer(self, viewer: Viewer) -> Health:
        """Reduce it to what a viewer may see: of what concerns other VOs only that it is so."""
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
                    summary=describe(check),
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
