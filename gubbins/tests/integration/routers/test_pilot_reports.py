"""Reports of pilots and stale pilots, in the real DiracX application."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from diracx.core.properties import GENERIC_PILOT, NORMAL_USER, SERVICE_ADMINISTRATOR
from support.diracx_application import token_maker
from support.moving_clock import Clock
from support.pilots_with_secrets import API, World, secret_of

from gubbins.ces import Observation, Observed
from gubbins.db.sql import MyPilotDB, MyPilotStatus
from gubbins.logic import my_pilots as logic

pytestmark = pytest.mark.usefixtures("inline_sqlite")


async def test_a_report_requires_the_token_of_the_pilot(world: World) -> None:
    make = token_maker()
    _, pilot = await world.submit()
    for properties in ((NORMAL_USER,), (GENERIC_PILOT,), (SERVICE_ADMINISTRATOR,)):
        assert (await world.report(make(*properties))).status_code == 403
    assert (await world.client.post(f"{API}/report", json={})).status_code == 401
    assert (await world.report(make(GENERIC_PILOT, vo="nowhere"))).status_code == 403
    for wrong in ("", "x" * 43, secret_of((await world.submit("dteam"))[1])):
        assert (await world.exchange(pilot, secret=wrong)).status_code in (401, 422)
    unknown = await world.exchange(pilot, stamp="0" * 32)
    assert unknown.json() == (await world.exchange(pilot, secret="x")).json()


async def test_a_report_makes_a_submitted_pilot_running_and_its_history_has_the_host(world: World) -> None:
    pilot_id, token = await world.running(host="node17", cores=8, memory_mb=16000)
    assert (await world.report(token)).status_code == 200
    pilot = await logic.get_pilot(world.db, pilot_id)
    assert [step["status"] for step in pilot["history"]] == ["SUBMITTED", "RUNNING"]
    assert pilot["history"][1]["reason"] == "on node17, 8 cores, 16000 MB"
    assert (pilot["host"], pilot["last_error"], pilot["stale"]) == ("node17", None, False)
    assert await world.db.count_illegal_histories() == 0


@pytest.mark.parametrize("outcome", ["no work", "node unfit", "error", "worked"])
async def test_the_site_determines_the_final_state_and_the_pilot_adds_the_reason(
    world: World, scripted: Any, outcome: str
) -> None:
    pilot_id, token = await world.running()
    response = await world.report(token, outcome=outcome, exit_code=3, jobs_done=2, detail="no GPU\x1b[31m here")
    assert response.json()["status"] == "RUNNING"
    assert (await world.db.get_pilot(pilot_id))["status"] is MyPilotStatus.RUNNING
    scripted.observations["ce"] = Observation(Observed.FAILED, "exit code 3: sorry")
    await logic.transition_pilot_states(world.db, "lhcb")
    pilot = await logic.get_pilot(world.db, pilot_id)
    assert pilot["history"][-1] == {
        "status": MyPilotStatus.FAILED,
        "at": pilot["ended_at"],
        "reason": f"exit code 3: sorry; reported by the pilot: {outcome}, exit code 3, 2 jobs, no GPU [31m here",
    }
    assert (pilot["outcome"], pilot["jobs_done"]) == (outcome, 2)
    assert await world.db.count_illegal_histories() == 0


async def test_pilots_without_work_are_counted_separately(world: World, scripted: Any) -> None:
    for outcome in ("no work", "no work", "worked"):
        _, token = await world.running()
        await world.report(token, outcome=outcome)
    scripted.observations["ce"] = Observation(Observed.DONE)
    await logic.transition_pilot_states(world.db, "lhcb")
    make = token_maker()
    headers = {"Authorization": f"Bearer {make(NORMAL_USER)}"}
    summary = (await world.client.get(f"{API}/summary", headers=headers)).json()
    assert summary["reports"] == {"lhcb": {"ce": {"no work": 2, "worked": 1}}}
    assert summary["totals"] == {"DONE": 3}
    others = {"Authorization": f"Bearer {make(NORMAL_USER, vo='dteam')}"}
    assert (await world.client.get(f"{API}/summary", headers=others)).json()["reports"] == {}
    since = (await logic.get_pilot(world.db, 1))["submitted_at"]
    assert await logic.count_without_work(world.db, since) == {"ce": 2}
    assert await logic.count_without_work(world.db, since, "dteam") == {}


async def test_a_running_pilot_without_heartbeats_is_stale_and_stays_running(
    world: World, scripted: Any, time: Clock
) -> None:
    rules = {"heartbeat_seconds": 60, "stale_after_seconds": 150}
    await world.db.set_ce("ce", capacity=100, success_rate=1.0, backend="scripted", rules=rules)
    beating, beats = await world.running()
    stopped, _ = await world.running()
    silent, _ = await world.submit()  # never sent one
    await world.db.advance_pilots({MyPilotStatus.RUNNING: [(silent, None)]}, vo="lhcb")
    scripted.observations["ce"] = Observation(Observed.RUNNING)
    for _ in range(3):
        time.at += timedelta(seconds=60)
        assert (await world.report(beats)).json()["heartbeat_seconds"] == 60
    await logic.transition_pilot_states(world.db, "lhcb")
    headers = {"Authorization": f"Bearer {token_maker()(NORMAL_USER)}"}
    found = (await world.client.get(f"{API}/pilots", headers=headers)).json()["items"]
    assert {each["pilot_id"]: each["stale"] for each in found} == {beating: False, stopped: True, silent: False}
    assert {each["status"] for each in found} == {"RUNNING"}
    page = (await world.client.get(f"{API}/pilots?stale=true", headers=headers)).json()
    assert (page["total"], [each["pilot_id"] for each in page["items"]]) == (1, [stopped])
    assert await logic.count_reports(world.db) == {"lhcb": {"ce": {"stale": 1}}}
    scripted.observations["ce"] = Observation(Observed.DONE)
    await logic.transition_pilot_states(world.db, "lhcb")
    assert await logic.count_reports(world.db) == {}


async def test_a_pilot_that_has_reported_is_not_cancelled_as_waiting(
    world: World, scripted: Any, time: Clock
) -> None:
    await world.db.set_ce("ce", capacity=100, success_rate=1.0, backend="scripted", rules={"max_waiting_hours": 1})
    running, _ = await world.running()
    waiting, _ = await world.submit()
    time.at += timedelta(hours=2)
    scripted.observations["ce"] = Observation(Observed.WAITING)
    await logic.transition_pilot_states(world.db, "lhcb")
    cancelled = [(await world.db.get_pilot(id))["cancel_requested_at"] is not None for id in (running, waiting)]
    assert cancelled == [False, True]


async def test_a_heartbeat_is_one_small_update_and_locks_no_compute_element(
    world: World, count_statements: Callable[[MyPilotDB], Any]
) -> None:
    _, token = await world.running()
    db = next(
        function.__self__
        for function in world.app.lifetime_functions
        if isinstance(getattr(function, "__self__", None), MyPilotDB)
    )
    with count_statements(db) as statements:
        assert (await world.report(token)).status_code == 200
    assert [statement.split()[0] for statement in statements] == ["SELECT", "UPDATE"]
    assert statements[1].startswith('UPDATE "PilotIdentities"')


@pytest.mark.parametrize(
    "said",
    [
        {"host": "x" * 256},
        {"cores": -1},
        {"cores": 2**63},
        {"cores": "8"},
        {"memory_mb": 1.5},
        {"exit_code": 256},
        {"outcome": "splendid"},
        {"detail": "x" * 1001},
        {"vo": "dteam"},
        {"status": "DONE"},
        {"stamp": "0" * 32},
    ],
)
async def test_an_invalid_report_changes_nothing(world: World, said: dict[str, Any]) -> None:
    pilot_id, token = await world.running(host="node17")
    before = await world.db.get_pilot(pilot_id)
    assert (await world.report(token, **said)).status_code == 422
    assert await world.db.get_pilot(pilot_id) == before


async def test_any_text_of_a_pilot_is_stored_as_one_printable_line(world: World) -> None:
    pilot_id, token = await world.running(host="a\u0000b\nc", detail="x\r\n\u202ey" * 100)
    pilot = await world.db.get_pilot(pilot_id)
    assert (pilot["host"], pilot["detail"].isprintable(), len(pilot["detail"]) <= 200) == ("a b c", True, True)
    assert (await world.report(token)).status_code == 200


async def test_stale_and_idle_pilots_are_shown_in_command_line_dashboard_and_metrics(
    world: World, scripted: Any, time: Clock
) -> None:
    from prometheus_client import Metric

    from gubbins.cli.app import _with_report
    from gubbins.dashboard.read_models import PilotReadModels
    from gubbins.metrics import pilot_metrics

    rules = {"heartbeat_seconds": 60, "stale_after_seconds": 150}
    await world.db.set_ce("ce", capacity=100, success_rate=1.0, backend="scripted", rules=rules)
    idle, token = await world.running()
    await world.report(token, outcome="no work")
    scripted.observations["ce"] = Observation(Observed.DONE)
    await logic.transition_pilot_states(world.db, "lhcb")
    stopped, _ = await world.running()
    time.at += timedelta(seconds=151)
    states = [_with_report(await logic.get_pilot(world.db, id))["status"] for id in (idle, stopped)]
    assert states == ["DONE (no work)", "RUNNING (stale)"]
    assert (await logic.get_ce(world.db, "ce"))["reports"] == {"no work": 1, "stale": 1}
    assert (await logic.get_ce(world.db, "ce", "dteam"))["reports"] == {}
    metrics: list[Metric] = await pilot_metrics(world.db)
    values = {metric.name: [sample.value for sample in metric.samples] for metric in metrics}
    assert values["pilots_stale"] == values["pilots_without_work_past_hour"] == [1]
    models = PilotReadModels()
    models.use(world.db)
    statistics = await models.statistics(None)
    assert (statistics.idle_rate("ce"), statistics.failure_rate("ce")) == (1.0, 0.0)
    assert (await models.reports("dteam"), await models.reports(None)) == (
        {},
        {"lhcb": {"ce": {"stale": 1, "no work": 1}}},
    )
