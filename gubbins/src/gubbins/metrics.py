"""Metrics of pilots and compute elements (entry point `diracx.tasks_metrics`)."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import Any

from diracx.tasks.operations.exposition import gauge
from prometheus_client import Metric

from gubbins.db import URL_VARIABLE
from gubbins.db.sql import MyPilotDB
from gubbins.domain import clock
from gubbins.domain.circuit_breaker import CircuitState
from gubbins.domain.pilot_states import MyPilotStatus
from gubbins.logic import my_pilots as logic


@asynccontextmanager
async def source() -> AsyncIterator[Callable[[], Awaitable[Sequence[Metric]]] | None]:
    """Yield a function that reads the metrics from the configured database; None: none is configured."""
    url = os.environ.get(URL_VARIABLE)
    if not url:
        yield None
        return
    database = MyPilotDB(url)
    async with database.engine_context():
        yield partial(pilot_metrics, database)


async def pilot_metrics(db: MyPilotDB) -> list[Metric]:
    """Read all metrics, in a constant number of statements."""
    summary = await logic.count_pilots(db, None)
    hour_ago = clock.now() - timedelta(hours=1)
    ended, idle = await logic.count_ended_pilots(db, hour_ago), await logic.count_without_work(db, hour_ago)
    reports = await logic.count_reports(db)
    ces = [({"ce": ce["name"]}, ce) for ce in await logic.list_ces(db)]

    def of_ces(name: str, text: str, value: Callable[[dict[str, Any]], float]) -> Metric:
        return gauge(name, text, ((labels, value(ce)) for labels, ce in ces))

    return [
        gauge(
            "pilots",
            "Pilots in each state.",
            (
                ({"vo": vo, "ce": ce, "state": str(state)}, states.get(str(state), 0))
                for vo, by_ce in summary.items()
                for ce, states in by_ce.items()
                for state in MyPilotStatus
            ),
        ),
        gauge(
            "pilots_ended_past_hour",
            "Pilots that ended in the past hour, by final state.",
            (
                ({**labels, "state": str(state)}, ended.get(ce["name"], {}).get(state, 0))
                for labels, ce in ces
                for state in (MyPilotStatus.DONE, MyPilotStatus.FAILED, "CANCELLED")
            ),
        ),
        gauge(
            "pilots_stale",
            "Running pilots whose heartbeats have stopped.",
            (
                ({"vo": vo, "ce": ce}, counts.get("stale", 0))
                for vo, by_ce in reports.items()
                for ce, counts in by_ce.items()
            ),
        ),
        of_ces(
            "pilots_without_work_past_hour",
            "Pilots that ended in the past hour and found no work.",
            lambda ce: idle.get(ce["name"], 0),
        ),
        of_ces("compute_element_slots", "Slots of a compute element.", lambda ce: ce["capacity"]),
        of_ces("compute_element_slots_used", "Slots taken by active pilots.", lambda ce: ce["active"]),
        of_ces("compute_element_enabled", "1 if a compute element is enabled.", lambda ce: int(ce["enabled"])),
        of_ces(
            "compute_element_banned",
            "1 if a compute element is banned.",
            lambda ce: int(ce["banned_at"] is not None),
        ),
        of_ces(
            "compute_element_downtime",
            "1 if a compute element is in downtime, or drained for one.",
            lambda ce: int(ce["downtime"] is not None),
        ),
        gauge(
            "compute_element_circuit",
            "1 for the state of the circuit of each kind of call, 0 for the others.",
            (
                ({**labels, "call": call, "state": str(state)}, int(circuit["state"] == state))
                for labels, ce in ces
                for call, circuit in ce["circuits"].items()
                for state in CircuitState
            ),
        ),
    ]
