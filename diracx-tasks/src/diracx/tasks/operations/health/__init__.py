"""Health checks: one list for `status`, the dashboard, `/readyz`, metrics and alert rules."""

from __future__ import annotations

from .alerts import Alert, Severity
from .runner import ENTRY_POINT_GROUP, Health, HealthChecks, HealthSource, health_checks
from .thresholds import HealthThresholds

__all__ = [
    "ENTRY_POINT_GROUP",
    "Alert",
    "Health",
    "HealthChecks",
    "HealthSource",
    "HealthThresholds",
    "Severity",
    "health_checks",
]
