"""OpenTelemetry instruments of a process."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

#: Name of the meter.
METER = "diracx.tasks"
#: Counter: submitted tasks, with the name of the published package.
TASKS_SUBMITTED = "tasks_submitted_total"
#: Counter: configurations that could not come into force.
RELOAD_FAILURES = "diracx.tasks.config.reload_failures"
#: Gauge: 1 while the current configuration is in force, 0 while an earlier one is.
CONFIG_IS_CURRENT = "diracx.tasks.config.current"
#: Counter: SQL transactions that were repeated after a conflict.
DATABASE_CONFLICTS = "diracx.tasks.database.conflicts"


def count_conflict(database: str) -> None:
    """Count a transaction that is repeated after a conflict, such as a deadlock. Prometheus appends `_total`."""
    if "opentelemetry.metrics" in sys.modules:
        _conflicts().add(1, {"database": database})


@cache
def _conflicts() -> Any:
    from opentelemetry import metrics

    return metrics.get_meter(METER).create_counter(
        DATABASE_CONFLICTS, unit="{transaction}", description="SQL transactions that were repeated."
    )


def count_reload_failure() -> None:
    """Count a configuration that cannot come into force. Prometheus appends `_total`."""
    if (instruments := _config_instruments()) is not None:
        instruments[0].add(1)


def set_config_is_current(current: bool) -> None:
    """Set whether the process runs with the current configuration or an earlier one."""
    if (instruments := _config_instruments()) is not None:
        instruments[1].set(int(current))


def _config_instruments() -> tuple[Any, Any] | None:
    """Return counter and gauge; None if OpenTelemetry is not imported."""
    return _made_instruments() if "opentelemetry.metrics" in sys.modules else None


@cache
def _made_instruments() -> tuple[Any, Any]:
    from opentelemetry import metrics

    meter = metrics.get_meter(METER)
    return (
        meter.create_counter(
            RELOAD_FAILURES, unit="{failure}", description="Configurations that could not come into force."
        ),
        meter.create_gauge(CONFIG_IS_CURRENT, description="1 while the current configuration is in force."),
    )
