"""Pilots exchange their secrets for tokens and report, in the real DiracX application."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from config_repository import ConfigRepository
from diracx.core.properties import GENERIC_PILOT, NORMAL_USER, SERVICE_ADMINISTRATOR
from diracx.tasks.operations.audit import read_audit
from diracx.tasks.web.api.api import router as tasks_router
from diracx_application import HOME, set_environment, token_maker
from moving_clock import Clock
from redis.asyncio import Redis

from gubbins.ces import Observation, Observed, PilotAtCE, SubmitOutcome
from gubbins.db.sql import MyPilotDB, MyPilotStatus
from gubbins.logic import my_pilots as logic
from gubbins.logic.my_pilots.request_rate import PilotRates, RequestRate, pilot_rates
from gubbins.routers.my_pilots import router

API = "/api/my_pilots"
VOS = ("lhcb", "dteam")


@dataclass
class World:
    """The application, and what the compute element `ce` was given."""

    app: Any
    db: MyPilotDB
    path: Path
    client: httpx.AsyncClient
    at_ce: list[PilotAtCE]

    async def submit(self, vo: str = "lhcb", **how: Any) -> tuple[int, PilotAtCE]:
        pilot_id = await logic.submit_pilot(self.db, "ce", vo, **how)
        return pilot_id, self.at_ce[-1]

    async def exchange(self, pilot: PilotAtCE, **other: Any) -> httpx.Response:
        asked = {"stamp": pilot.stamp, "secret": secret_of(pilot)} | other
        return await self.client.post(f"{API}/token", json=asked)

    async def refresh(self, pilot: PilotAtCE, token: str) -> httpx.Response:
        return await self.client.post(f"{API}/token", json={"stamp": pilot.stamp, "refresh_token": token})

    async def token(self, pilot: PilotAtCE) -> str:
        answer = await self.exchange(pilot)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["access_token"])

    async def report(self, token: str, **said: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}"}
        return await self.client.post(f"{API}/report", json=said, headers=headers)

    async def running(self, **said: Any) -> tuple[int, str]:
        """A pilot that has reported: its id, and its token."""
        pilot_id, pilot = await self.submit()
        token = await self.token(pilot)
        assert (await self.report(token, **said)).status_code == 200
        return pilot_id, token


def secret_of(pilot: PilotAtCE) -> str:
    assert pilot.identity is not None
    return pilot.identity.secret


@pytest.fixture
async def world(
    sqlite_db: MyPilotDB,
    sqlite_url: str,
    redis_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scripted: Any,
) -> AsyncIterator[World]:
    from diracx.core.config import ConfigSource
    from diracx.routers.factory import create_app

    at_ce: list[PilotAtCE] = []

    async def submit(self: Any, pilots: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome]:
        at_ce.extend(pilots)
        return {pilot.stamp: SubmitOutcome(f"job.{pilot.stamp}") for pilot in pilots}

    monkeypatch.setattr(scripted, "submit", submit)
    await sqlite_db.add_ce("ce", 100, 1.0, backend="scripted")
    set_environment(monkeypatch, tmp_path, redis_url, ConfigRepository(tmp_path / "config", vos=VOS).url)
    monkeypatch.setenv("DIRACX_DB_URL_MYPILOTDB", sqlite_url)
    monkeypatch.setenv("DIRACX_SERVICE_MY_PILOTS_ENABLED", "true")
    monkeypatch.setenv("GUBBINS_PILOT_API_URL", f"{HOME}{API}/")
    app = create_app()
    app.dependency_overrides[ConfigSource.create].__self__.read()  # else the first answer is 503
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url=HOME) as client,
    ):
        yield World(app, sqlite_db, Path(sqlite_url.partition("///")[2]), client, at_ce)


async def test_each_pilot_gets_a_secret_of_its_own_and_the_database_its_hash_alone(world: World) -> None:
    for vo in VOS:
        await logic.request_pilots(world.db, vo, vos=VOS)
    stamps = await world.db.waiting_requests("ce", at_most=1_000)
    await logic.submit_requested_pilot(world.db, "ce", stamps[0][1], stamp=stamps[0][0])
    secrets = {secret_of(pilot) for pilot in world.at_ce}
    assert len(secrets) == len(world.at_ce) == 100
    with closing(sqlite3.connect(world.path)) as connection:
        dump = "\n".join(connection.iterdump())
    assert not [secret for secret in secrets if secret in dump]
    assert [(await world.exchange(pilot)).status_code for pilot in world.at_ce[::25]] == [200] * 4


async def test_a_secret_is_not_in_what_is_printed_of_a_pilot(world: World) -> None:
    pilot_id, pilot = await world.submit()
    assert secret_of(pilot) not in f"{pilot!r} {pilot} {await logic.get_pilot(world.db, pilot_id)}"


async def test_without_an_address_or_by_its_rule_a_pilot_has_no_identity(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.db.set_ce("ce", capacity=100, success_rate=1.0, backend="scripted", rules={"identity": False})
    without = [await world.submit()]
    monkeypatch.delenv("GUBBINS_PILOT_API_URL")
    await world.db.set_ce("ce", capacity=100, success_rate=1.0, backend="scripted", rules={})
    without.append(await world.submit())
    assert [pilot.identity for _, pilot in without] == [None, None]
    for _, pilot in without:
        asked = {"stamp": pilot.stamp, "secret": "x"}
        assert (await world.client.post(f"{API}/token", json=asked)).status_code == 401
    with closing(sqlite3.connect(world.path)) as connection:
        assert connection.execute("SELECT count(*) FROM PilotIdentities").fetchone() == (0,)


async def test_a_wrong_address_says_so_and_submits_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("ftp://here", "https://user:word@here", "https://here/$(id)", "https://h:99999", "here"):
        monkeypatch.setenv("GUBBINS_PILOT_API_URL", wrong)
        with pytest.raises(logic.PilotSubmissionError, match="GUBBINS_PILOT_API_URL must be of the form https://"):
            await world.submit()
    assert world.at_ce == []
    assert await world.db.get_pilot_summary() == {}


async def test_whichever_attempt_of_a_repeated_submission_reached_the_site_its_secret_is_good(
    world: World, scripted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lost(self: Any, pilots: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome]:
        world.at_ce.extend(pilots)
        raise TimeoutError

    stamp = "5" * 32
    with monkeypatch.context() as context:
        context.setattr(scripted, "submit", lost)
        with pytest.raises(logic.PilotSubmissionError):
            await world.submit(stamp=stamp)
    await world.submit(stamp=stamp)
    first, second = world.at_ce
    assert secret_of(first) != secret_of(second)
    assert (await world.exchange(first)).status_code == 200
    assert (await world.exchange(second)).status_code == 200


async def test_the_token_is_one_of_diracx_for_this_pilot_and_its_vo(world: World) -> None:
    from diracx.core.settings import AuthSettings
    from diracx.routers.utils.users import verify_dirac_access_token

    _, pilot = await world.submit("dteam")
    answer = await world.exchange(pilot)
    granted = answer.json()
    assert answer.headers["Cache-Control"] == "no-store"
    assert (granted["token_type"], granted["heartbeat_seconds"]) == ("Bearer", 300)
    assert 0 < granted["expires_in"] <= 1800
    user = await verify_dirac_access_token(f"Bearer {granted['access_token']}", AuthSettings())
    assert (user.vo, list(user.properties)) == ("dteam", [GENERIC_PILOT])
    assert user.policies["my_pilots"]["stamp"] == pilot.stamp


async def test_the_token_of_a_pilot_opens_no_other_route(world: World) -> None:
    pilot_id, token = await world.running()
    headers = {"Authorization": f"Bearer {token}"}
    opened = []
    for prefix, routes in ((API, router.routes), ("/api/tasks", tasks_router.routes)):
        for route in routes:
            path = re.sub(r"{\w+}", str(pilot_id), getattr(route, "path", ""))
            for method in getattr(route, "methods", ()):
                if path not in ("/token", "/report"):
                    body = {"name": "new", "capacity": 1} if path == "/ces" else None
                    answer = await world.client.request(method, prefix + path, headers=headers, json=body)
                    if answer.status_code not in (401, 403, 404, 422, 503):
                        opened.append(f"{method} {prefix}{path}: {answer.status_code}")
    assert opened == []
    for path in ("/pilots", "/ces", f"/pilots/{pilot_id}", "/summary"):
        assert (await world.client.get(API + path, headers=headers)).status_code == 403


async def test_only_the_own_token_of_a_pilot_reports(world: World) -> None:
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


async def test_a_pilot_of_a_vo_that_has_left_the_configuration_gets_no_token(world: World) -> None:
    _, pilot = await world.submit("gone")
    answer = await world.exchange(pilot)
    assert (answer.status_code, "registry" in answer.text) == (401, True)


async def test_a_secret_that_was_used_is_refused_and_the_audit_log_of_the_vo_tells(
    world: World, redis: Redis
) -> None:
    pilot_id, pilot = await world.submit()
    token = await world.token(pilot)
    assert (await world.report(token)).status_code == 200
    answer = await world.exchange(pilot)
    assert (answer.status_code, "replayed" in answer.text) == (401, True)
    assert (await world.report(token)).status_code == 200  # the first one goes on
    [entry] = await read_audit(redis, vo="lhcb")
    assert (entry.action, entry.target, entry.ok) == ("exchange pilot secret", str(pilot_id), False)
    assert pilot.stamp in entry.who
    assert secret_of(pilot) not in str(entry)
    assert await read_audit(redis, vo="dteam") == []


async def test_a_response_that_was_lost_may_be_asked_for_again_and_the_earlier_token_is_dead(world: World) -> None:
    _, pilot = await world.submit()
    lost, token = [await world.token(pilot) for _ in range(2)]
    assert (await world.report(lost)).status_code == 401
    assert (await world.report(token)).status_code == 200
    assert (await world.report(lost)).status_code == 401
    _, other = await world.submit()
    answers = [(await world.exchange(other)).status_code for _ in range(6)]
    assert answers == [200] * 5 + [401]


async def test_of_many_exchanges_at_once_one_token_is_good(world: World) -> None:
    import asyncio

    _, pilot = await world.submit()
    answers = await asyncio.gather(*(world.exchange(pilot) for _ in range(8)))
    tokens = [answer.json()["access_token"] for answer in answers if answer.status_code == 200]
    reports = [(await world.report(token)).status_code for token in tokens]
    assert reports.count(200) == 1


async def test_a_refresh_token_is_good_once_and_used_again_revokes_all(world: World, redis: Redis) -> None:
    pilot_id, pilot = await world.submit()
    first = (await world.exchange(pilot)).json()
    second = (await world.refresh(pilot, first["refresh_token"])).json()
    assert (await world.report(second["access_token"])).status_code == 200
    # Who has never seen one of them revokes nothing.
    for foreign in ("x.y", first["refresh_token"][::-1]):
        assert (await world.refresh(pilot, foreign)).status_code == 401
    assert (await world.report(second["access_token"])).status_code == 200
    again = await world.refresh(pilot, first["refresh_token"])
    assert (again.status_code, "revoked" in again.text) == (401, True)
    for token in (first, second):
        assert (await world.report(token["access_token"])).status_code == 401
        assert (await world.refresh(pilot, token["refresh_token"])).status_code == 401
    assert (await world.exchange(pilot)).status_code == 401
    entries = [(entry.action, entry.target) for entry in await read_audit(redis, vo="lhcb")]
    assert ("refresh pilot token", str(pilot_id)) in entries
    assert first["refresh_token"].partition(".")[0] not in str(await read_audit(redis, vo="lhcb"))


@pytest.mark.parametrize("how", ["ended", "cancelled"])
async def test_tokens_are_dead_with_the_pilot(world: World, how: str) -> None:
    pilot_id, pilot = await world.submit()
    _, fresh = await world.submit()
    granted = (await world.exchange(pilot)).json()
    assert (await world.report(granted["access_token"])).status_code == 200
    ids = [pilot_id, await world.db.find_pilot(fresh.stamp)]
    for id in ids:
        assert id is not None
        if how == "cancelled":
            await world.db.request_cancel(id, reason="by hand")
        else:
            for status in (MyPilotStatus.RUNNING, MyPilotStatus.DONE):
                await world.db.advance_pilots({status: [(id, None)]}, vo="lhcb")
    for answer in (
        await world.report(granted["access_token"]),
        await world.refresh(pilot, granted["refresh_token"]),
        await world.exchange(fresh),
    ):
        assert (answer.status_code, how[:6] in answer.text) == (401, True), answer.text
    assert (await world.exchange(fresh, secret="x")).json()["detail"] == (
        "not the secret or the token of an active pilot"
    )


async def test_a_report_makes_a_submitted_pilot_running_at_once_and_its_history_says_where(world: World) -> None:
    pilot_id, token = await world.running(host="node17", cores=8, memory_mb=16000)
    assert (await world.report(token)).status_code == 200
    pilot = await logic.get_pilot(world.db, pilot_id)
    assert [step["status"] for step in pilot["history"]] == ["SUBMITTED", "RUNNING"]
    assert pilot["history"][1]["reason"] == "on node17, 8 cores, 16000 MB"
    assert (pilot["host"], pilot["last_error"], pilot["stale"]) == ("node17", None, False)
    assert await world.db.count_illegal_histories() == 0


@pytest.mark.parametrize("outcome", ["no work", "node unfit", "error", "worked"])
async def test_the_end_is_what_the_site_says_with_the_reason_of_the_pilot(
    world: World, scripted: Any, outcome: str
) -> None:
    pilot_id, token = await world.running()
    said = await world.report(token, outcome=outcome, exit_code=3, jobs_done=2, detail="no GPU\x1b[31m here")
    assert said.json()["status"] == "RUNNING"
    assert (await world.db.get_pilot(pilot_id))["status"] is MyPilotStatus.RUNNING
    scripted.observations["ce"] = Observation(Observed.FAILED, "exit code 3: sorry")
    await logic.transition_pilot_states(world.db, "lhcb")
    pilot = await logic.get_pilot(world.db, pilot_id)
    assert pilot["history"][-1] == {
        "status": MyPilotStatus.FAILED,
        "at": pilot["ended_at"],
        "reason": f"exit code 3: sorry; the pilot says: {outcome}, exit code 3, 2 jobs, no GPU [31m here",
    }
    assert (pilot["outcome"], pilot["jobs_done"]) == (outcome, 2)
    assert await world.db.count_illegal_histories() == 0


async def test_a_pilot_that_found_no_work_is_counted_apart_from_one_that_worked(
    world: World, scripted: Any
) -> None:
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


async def test_a_running_pilot_whose_heartbeat_stopped_is_told_apart_and_goes_on(
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


async def test_a_pilot_that_has_reported_is_not_cancelled_for_waiting_though_the_site_is_behind(
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


async def test_too_many_requests_of_one_pilot_or_address_are_told_when_to_come_back(world: World) -> None:
    limited = PilotRates(RequestRate("address", 6), RequestRate("pilot", 3))
    world.app.dependency_overrides[pilot_rates] = lambda: limited
    (_, mine), (_, others) = await world.submit(), await world.submit()
    token = await world.token(others)
    answers = [await world.exchange(mine, secret="x") for _ in range(4)]
    assert [answer.status_code for answer in answers] == [401, 401, 401, 429]
    assert 0 < int(answers[-1].headers["Retry-After"]) <= 60
    assert (await world.exchange(others)).status_code == 200  # another pilot is not kept out
    assert (await world.exchange(others)).status_code == 429  # but its whole address is, now
    reports = [(await world.report(token)).status_code for _ in range(4)]
    assert reports[-1] == 429


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


async def test_a_request_for_a_token_is_bounded_and_what_was_sent_is_not_repeated(world: World) -> None:
    for asked in (
        {"stamp": "A" * 32, "secret": "s3cret-word"},
        {"stamp": "0" * 32, "secret": "s3cret-word", "refresh_token": "s3cret-word"},
        {"stamp": "0" * 32, "secret": "s3cret-word" * 20},
        {"stamp": "0" * 32, "secret": ["s3cret-word"]},
        {"stamp": "0" * 32},
        ["s3cret-word"],
    ):
        answer = await world.client.post(f"{API}/token", json=asked)
        assert (answer.status_code, "s3cret" in answer.text) == (422, False), answer.text
    long = await world.client.post(f"{API}/token", content=b" " * 2_000_000)
    assert long.status_code == 413


async def test_command_line_dashboard_and_metrics_tell_stale_and_idle_pilots_apart(
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
