"""OpenTelemetry metrics that each process counts for itself."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

#: Who measures, as OpenTelemetry knows it.
METER = "diracx.tasks"
#: Counter: tasks that were submitted, as the published package calls it.
TASKS_SUBMITTED = "tasks_submitted_total"
#: Counter: configurations that were written while the process ran and could not come into force.
RELOAD_FAILURES = "diracx.tasks.config.reload_failures"
#: Gauge: 1 while what is written is in force, 0 while an earlier configuration is.
CONFIG_IS_CURRENT = "diracx.tasks.config.current"
#: Counter: SQL transactions that the server ended because of others, and that were run again.
DATABASE_CONFLICTS = "diracx.tasks.database.conflicts"


def count_conflict(database: str) -> None:
    """Count a transaction that is run again after a deadlock or the like. Prometheus knows it with the suffix
    `_total`."""
    if "opentelemetry.metrics" in sys.modules:
        _conflicts().add(1, {"database": database})


@cache
def _conflicts() -> Any:
    from opentelemetry import metrics

    return metrics.get_meter(METER).create_counter(
        DATABASE_CONFLICTS, unit="{transaction}", description="SQL transactions that were run again."
    )


def count_reload_failure() -> None:
    """Count a configuration that cannot come into force. Prometheus knows it with the suffix `_total`."""
    if (instruments := _config_instruments()) is not None:
        instruments[0].add(1)


def set_config_is_current(current: bool) -> None:
    """Set whether the process runs with the present configuration or an earlier one."""
    if (instruments := _config_instruments()) is not None:
        instruments[1].set(int(current))


def _config_instruments() -> tuple[Any, Any] | None:
    """Return counter and gauge; None in a process that never imported OpenTelemetry."""
    return _made_instruments() if "opentelemetry.metrics" in sys.modules else None


@cache
def _made_instruments() -> tuple[Any, Any]:
    from opentelemetry import metrics

    meter = metrics.get_meter(METER)
    return (
        meter.create_counter(
            RELOAD_FAILURES, unit="{failure}", description="Configurations that could not come into force."
        ),
        meter.create_gauge(
            CONFIG_IS_CURRENT, description="1 while the configuration that is written is in force."
        ),
    )
