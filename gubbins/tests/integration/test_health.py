"""Health checks of compute elements."""

from __future__ import annotations

import shlex
from importlib.metadata import entry_points

import pytest
from diracx.tasks.operations.health import ENTRY_POINT_GROUP, Severity

from gubbins import health
from gubbins.db import URL_VARIABLE
from gubbins.db.sql import MyPilotDB
from gubbins.domain.circuit_breaker import CECall
from gubbins.domain.pilot_states import CANCELLED_OVERDUE, MyPilotStatus
from gubbins.logic import my_pilots as logic

NAME = "it's broken; now"


async def test_bans_circuits_and_failing_pilots_raise_alerts(
    sqlite_db: MyPilotDB, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with sqlite_db:
        for name in ("banned", NAME, "failing", "good", "closed", "few", "cancelled", "stalled", "draining"):
            await sqlite_db.add_ce(name, 20, 1.0, enabled=name != "closed")
        await sqlite_db.submit_pilot("draining", "lhcb")
        await sqlite_db.set_ce_enabled("draining", False)
    monkeypatch.setenv(URL_VARIABLE, sqlite_url)
    async with health.source() as ask:
        assert callable(ask)
        assert await ask() == [], "before that all is well"
        failed = [(name, CECall.SUBMIT) for name in ("banned", NAME, "closed", "draining")]
        for name, call in (*failed, ("closed", CECall.STATUS), ("draining", CECall.STATUS)):
            await sqlite_db.record_failure(
                name, call, "down", failures=1, pause_seconds=3600, max_pause_seconds=3600
            )
        await logic.ban_ce(sqlite_db, "banned", reason="flood")
        ended = {"failing": (6, 2), "good": (1, 7), "few": (3, 0), "cancelled": (6, 0), "stalled": (6, 0)}
        for name, (failed, done) in ended.items():
            for number in range(failed + done):
                pilot = await sqlite_db.submit_pilot(name, "lhcb")
                if name == "cancelled":
                    await sqlite_db.request_cancels([(pilot, "cancellation requested by alice")])
                elif name == "stalled":
                    await sqlite_db.request_cancels([(pilot, f"{CANCELLED_OVERDUE}ran longer than 1 h")])
                last = MyPilotStatus.FAILED if number < failed else MyPilotStatus.DONE
                for step in (MyPilotStatus.RUNNING, last):
                    await sqlite_db.update_pilot_status(pilot, step)
        alerts = await ask()
    found = {(alert.check, alert.subject): alert for alert in alerts}
    assert {where: (alert.severity, alert.count) for where, alert in found.items()} == {
        ("ce_banned", "banned"): (Severity.WARNING, 1),
        ("ce_circuit_open", f"{NAME} submit"): (Severity.CRITICAL, 1),
        ("ce_circuit_open", "draining status"): (Severity.CRITICAL, 1),
        ("ce_pilots_failing", "failing"): (Severity.WARNING, 6),
        ("ce_pilots_failing", "stalled"): (Severity.CRITICAL, 6),
    }
    assert "flood" in found["ce_banned", "banned"].summary
    assert found["ce_banned", "banned"].since is not None
    assert found["ce_circuit_open", f"{NAME} submit"].summary.startswith(f"{NAME}: 1 submit call has failed: ")
    command = found["ce_circuit_open", f"{NAME} submit"].remedy.split("`")[1]
    assert shlex.split(command) == ["gubbins", "ce", "enable", NAME], "it can be copied to a shell"
    assert "6 of 8" in found["ce_pilots_failing", "failing"].summary


async def test_without_a_database_of_pilots_the_health_checks_report_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    async with health.source() as ask:
        assert ask == f"compute elements and pilots: {URL_VARIABLE} is not set here"


def test_the_task_system_loads_these_checks() -> None:
    assert "gubbins.health:source" in {entry.value for entry in entry_points(group=ENTRY_POINT_GROUP)}
