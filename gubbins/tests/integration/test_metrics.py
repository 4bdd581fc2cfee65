"""Metrics of pilots."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from diracx.tasks.operations.collectors import ENTRY_POINT_GROUP, Collectors, open_collectors
from diracx.tasks.operations.exposition import as_text, gauge
from prometheus_client import Metric

from gubbins import metrics
from gubbins.db import URL_VARIABLE
from gubbins.db.sql import MyPilotDB
from gubbins.domain import clock
from gubbins.domain.circuit_breaker import CECall
from gubbins.domain.pilot_states import MyPilotStatus
from gubbins.logic import my_pilots as logic


async def test_pilots_are_counted_by_vo_compute_element_and_state(
    sqlite_db: MyPilotDB, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with sqlite_db:
        await sqlite_db.add_ce("ce<b>.example.org", 5, 1.0)
        await sqlite_db.add_ce("closed.example.org", 7, 1.0, enabled=False)
        await sqlite_db.add_ce("banned.example.org", 7, 1.0)
    await logic.ban_ce(sqlite_db, "banned.example.org", reason="flood")
    await sqlite_db.record_failure(
        "closed.example.org", CECall.STATUS, "down", failures=1, pause_seconds=3600, max_pause_seconds=3600
    )
    for state, hours in ((MyPilotStatus.FAILED, 0), (MyPilotStatus.DONE, 2)):
        pilot = await sqlite_db.submit_pilot("ce<b>.example.org", "lhcb")
        then = datetime.now(UTC) - timedelta(hours=hours)
        with clock.simulated(lambda then=then: then):  # type: ignore[misc]
            for step in (MyPilotStatus.RUNNING, state):
                await sqlite_db.update_pilot_status(pilot, step)
    for vo in ("lhcb", "lhcb", "gridpp"):
        await logic.submit_pilot(sqlite_db, "ce<b>.example.org", vo)
    monkeypatch.setenv(URL_VARIABLE, sqlite_url)
    async with metrics.source() as ask:
        assert ask is not None
        lines = as_text(await ask()).decode().splitlines()
    assert 'pilots{ce="ce<b>.example.org",state="SUBMITTED",vo="lhcb"} 2.0' in lines
    assert 'pilots{ce="ce<b>.example.org",state="SUBMITTED",vo="gridpp"} 1.0' in lines
    assert 'pilots{ce="ce<b>.example.org",state="RUNNING",vo="gridpp"} 0.0' in lines
    assert 'pilots_ended_past_hour{ce="ce<b>.example.org",state="FAILED"} 1.0' in lines
    assert 'pilots_ended_past_hour{ce="ce<b>.example.org",state="DONE"} 0.0' in lines
    assert 'pilots_ended_past_hour{ce="closed.example.org",state="FAILED"} 0.0' in lines
    assert 'compute_element_slots{ce="ce<b>.example.org"} 5.0' in lines
    assert 'compute_element_slots_used{ce="ce<b>.example.org"} 3.0' in lines
    assert 'compute_element_enabled{ce="closed.example.org"} 0.0' in lines
    assert 'compute_element_banned{ce="closed.example.org"} 0.0' in lines
    assert 'compute_element_banned{ce="banned.example.org"} 1.0' in lines
    circuits = [line for line in lines if "compute_element_circuit{" in line and 'ce="closed.example.org"' in line]
    assert len(circuits) == 6
    assert {line for line in circuits if line.endswith("} 1.0")} == {
        'compute_element_circuit{call="submit",ce="closed.example.org",state="closed"} 1.0',
        'compute_element_circuit{call="status",ce="closed.example.org",state="open"} 1.0',
    }


async def test_without_a_database_of_pilots_there_are_no_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    async with metrics.source() as ask:
        assert ask is None


async def test_a_failing_source_of_metrics_is_reported_and_does_not_affect_others() -> None:
    async def works() -> list[Metric]:
        return [gauge("pilots", "Pilots.", [({"vo": "lhcb"}, 3)])]

    async def fails() -> list[Metric]:
        raise ConnectionError("gone")

    text = as_text(await Collectors({"works": works, "fails": fails}).metrics()).decode()
    assert 'pilots{vo="lhcb"} 3.0' in text
    assert 'metrics_source_up{source="works"} 1.0' in text
    assert 'metrics_source_up{source="fails"} 0.0' in text


async def test_the_task_system_loads_these_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = entry_points(group=ENTRY_POINT_GROUP, name="pilots")
    assert {entry.value for entry in installed} == {"gubbins.metrics:source"}
    monkeypatch.setenv(URL_VARIABLE, f"sqlite+aiosqlite:///{tmp_path}/empty.db")
    async with open_collectors(None) as found:
        text = as_text(await found.metrics()).decode()
    assert 'metrics_source_up{source="pilots"} 0.0' in text  # it has no tables
