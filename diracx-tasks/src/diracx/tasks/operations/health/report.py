"""Result of all health checks, and its reduction for members of a VO."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ..models import ReadModel, Snapshot
from ..visibility import Viewer
from .alerts import Alert, Severity
from .checks import describe


@dataclass(frozen=True, slots=True, kw_only=True)
class Health(ReadModel):
    """Result of all health checks at one moment."""

    severity: Severity
    """The highest severity of the alerts."""
    alerts: list[Alert] = field(default_factory=list)
    """Alerts by descending severity."""
    unchecked: list[str] = field(default_factory=list)
    """Checks that are not configured, each with the reason."""
    snapshot: Snapshot | None = None
    """The whole system; None if the server did not respond."""
    error: Exception | None = None
    """Error of the server if it did not respond."""

    def for_viewer(self, viewer: Viewer) -> Health:
        """Reduce it for a viewer of one VO: alerts that are not public are merged by check, without names."""
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
                    remedy="ask an administrator, who sees the details",
                    count=len(these),
                    since=min((each.since for each in these if each.since is not None), default=None),
                )
            )
        shown.sort(key=lambda alert: -alert.severity.rank)
        snapshot = None if self.snapshot is None else viewer.snapshot(self.snapshot)
        return replace(self, alerts=shown, snapshot=snapshot, unchecked=[])

    def names(self) -> list[str]:
        """Return `{severity} {check}` of each alert, without duplicates."""
        return list(dict.fromkeys(f"{alert.severity} {alert.check}" for alert in self.alerts))

    def as_json(self) -> dict[str, Any]:
        """Return the alerts and the fields of the snapshot for `json.dumps`."""
        return {
            **({} if self.snapshot is None else self.snapshot.as_json()),
            "severity": str(self.severity),
            "alerts": [alert.as_json() for alert in self.alerts],
            "unchecked": self.unchecked,
        }
