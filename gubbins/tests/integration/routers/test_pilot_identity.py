"""Exchange of secrets of pilots for tokens, in the real DiracX application."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import pytest
from diracx.core.properties import GENERIC_PILOT
from diracx.tasks.operations.audit import read_audit
from diracx.tasks.web.api.api import router as tasks_router
from redis.asyncio import Redis
from support.pilots_with_secrets import API, VOS, World, secret_of

from gubbins.ces import PilotAtCE, SubmitOutcome
from gubbins.db.sql import MyPilotStatus
from gubbins.logic import my_pilots as logic
from gubbins.logic.my_pilots.request_rate import PilotRates, RequestRate, pilot_rates
from gubbins.routers.my_pilots import router


async def test_each_pilot_gets_its_own_secret_and_the_database_stores_the_hash(world: World) -> None:
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


async def test_a_secret_is_not_in_the_representation_of_a_pilot(world: World) -> None:
    pilot_id, pilot = await world.submit()
    assert secret_of(pilot) not in f"{pilot!r} {pilot} {await logic.get_pilot(world.db, pilot_id)}"


async def test_without_a_url_or_by_a_rule_pilots_have_no_identity(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.db.set_ce("ce", capacity=100, success_rate=1.0, backend="scripted", rules={"identity": False})
    without = [await world.submit()]
    monkeypatch.delenv("GUBBINS_PILOT_API_URL")
    await world.db.set_ce("ce", capacity=100, success_rate=1.0, backend="scripted", rules={})
    without.append(await world.submit())
    assert [pilot.identity for _, pilot in without] == [None, None]
    for _, pilot in without:
        body = {"stamp": pilot.stamp, "secret": "x"}
        assert (await world.client.post(f"{API}/token", json=body)).status_code == 401
    with closing(sqlite3.connect(world.path)) as connection:
        assert connection.execute("SELECT count(*) FROM PilotIdentities").fetchone() == (0,)


async def test_an_invalid_url_is_an_error_and_nothing_is_submitted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wrong in ("ftp://here", "https://user:word@here", "https://here/$(id)", "https://h:99999", "here"):
        monkeypatch.setenv("GUBBINS_PILOT_API_URL", wrong)
        with pytest.raises(logic.PilotSubmissionError, match="GUBBINS_PILOT_API_URL must be of the form https://"):
            await world.submit()
    assert world.at_ce == []
    assert await world.db.get_pilot_summary() == {}


async def test_the_secret_of_each_attempt_of_a_repeated_submission_is_valid(
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


async def test_the_token_is_a_diracx_token_of_the_pilot_and_its_vo(world: World) -> None:
    from diracx.core.settings import AuthSettings
    from diracx.routers.utils.users import verify_dirac_access_token

    _, pilot = await world.submit("dteam")
    response = await world.exchange(pilot)
    granted = response.json()
    assert response.headers["Cache-Control"] == "no-store"
    assert (granted["token_type"], granted["heartbeat_seconds"]) == ("Bearer", 300)
    assert 0 < granted["expires_in"] <= 1800
    user = await verify_dirac_access_token(f"Bearer {granted['access_token']}", AuthSettings())
    assert (user.vo, list(user.properties)) == ("dteam", [GENERIC_PILOT])
    assert user.policies["my_pilots"]["stamp"] == pilot.stamp


async def test_the_token_of_a_pilot_is_refused_by_other_routes(world: World) -> None:
    pilot_id, token = await world.running()
    headers = {"Authorization": f"Bearer {token}"}
    opened = []
    for prefix, routes in ((API, router.routes), ("/api/tasks", tasks_router.routes)):
        for route in routes:
            path = re.sub(r"{\w+}", str(pilot_id), getattr(route, "path", ""))
            for method in getattr(route, "methods", ()):
                if path not in ("/token", "/report"):
                    body = {"name": "new", "capacity": 1} if path == "/ces" else None
                    response = await world.client.request(method, prefix + path, headers=headers, json=body)
                    if response.status_code not in (401, 403, 404, 422, 503):
                        opened.append(f"{method} {prefix}{path}: {response.status_code}")
    assert opened == []
    for path in ("/pilots", "/ces", f"/pilots/{pilot_id}", "/summary"):
        assert (await world.client.get(API + path, headers=headers)).status_code == 403


async def test_a_pilot_of_a_vo_outside_the_configuration_gets_no_token(world: World) -> None:
    _, pilot = await world.submit("gone")
    response = await world.exchange(pilot)
    assert (response.status_code, "registry" in response.text) == (401, True)


async def test_a_reused_secret_is_refused_and_audited(world: World, redis: Redis) -> None:
    pilot_id, pilot = await world.submit()
    token = await world.token(pilot)
    assert (await world.report(token)).status_code == 200
    response = await world.exchange(pilot)
    assert (response.status_code, "replayed" in response.text) == (401, True)
    assert (await world.report(token)).status_code == 200  # the first one goes on
    [entry] = await read_audit(redis, vo="lhcb")
    assert (entry.action, entry.target, entry.ok) == ("exchange pilot secret", str(pilot_id), False)
    assert pilot.stamp in entry.who
    assert secret_of(pilot) not in str(entry)
    assert await read_audit(redis, vo="dteam") == []


async def test_an_exchange_can_be_repeated_before_the_token_is_used(world: World) -> None:
    _, pilot = await world.submit()
    lost, token = [await world.token(pilot) for _ in range(2)]
    assert (await world.report(lost)).status_code == 401
    assert (await world.report(token)).status_code == 200
    assert (await world.report(lost)).status_code == 401
    _, other = await world.submit()
    responses = [(await world.exchange(other)).status_code for _ in range(6)]
    assert responses == [200] * 5 + [401]


async def test_of_concurrent_exchanges_one_token_is_valid(world: World) -> None:
    import asyncio

    _, pilot = await world.submit()
    responses = await asyncio.gather(*(world.exchange(pilot) for _ in range(8)))
    tokens = [response.json()["access_token"] for response in responses if response.status_code == 200]
    reports = [(await world.report(token)).status_code for token in tokens]
    assert reports.count(200) == 1


async def test_a_refresh_token_is_valid_once_and_its_reuse_revokes_all(world: World, redis: Redis) -> None:
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


@pytest.mark.parametrize("how", ["without its VO", "unreadable"])
async def test_a_pilot_keeps_its_identity_while_the_configuration_is_wrong(world: World, how: str) -> None:
    from diracx.core.config import ConfigSource
    from fastapi import HTTPException
    from support.fixed_config import config_url

    async def unreadable() -> None:
        raise HTTPException(503, "no configuration")

    (_, running), (_, fresh) = await world.submit(), await world.submit()
    granted = (await world.exchange(running)).json()
    assert (await world.report(granted["access_token"])).status_code == 200
    other = ConfigSource.create_from_url(backend_url=config_url(["dteam"]))
    overrides, created = world.app.dependency_overrides, ConfigSource.create
    right = overrides[created]
    overrides[created], status = (unreadable, 503) if how == "unreadable" else (other.read_non_blocking, 401)
    other.read()
    for _ in range(6):
        refused = [await world.refresh(running, granted["refresh_token"]), await world.exchange(fresh)]
        assert [response.status_code for response in refused] == [status] * 2, refused[0].text
    overrides[created] = right
    assert (await world.exchange(fresh)).status_code == 200
    assert (await world.refresh(running, granted["refresh_token"])).status_code == 200


@pytest.mark.parametrize("how", ["ended", "cancelled"])
async def test_tokens_of_an_ended_pilot_are_invalid(world: World, how: str) -> None:
    pilot_id, pilot = await world.submit()
    fresh_id, fresh = await world.submit()
    granted = (await world.exchange(pilot)).json()
    assert (await world.report(granted["access_token"])).status_code == 200
    for id in (pilot_id, fresh_id):
        if how == "cancelled":
            await world.db.request_cancels([(id, "by hand")])
        else:
            for status in (MyPilotStatus.RUNNING, MyPilotStatus.DONE):
                await world.db.advance_pilots({status: [(id, None)]}, vo="lhcb")
    for response in (
        await world.report(granted["access_token"]),
        await world.refresh(pilot, granted["refresh_token"]),
        await world.exchange(fresh),
    ):
        assert (response.status_code, how[:6] in response.text) == (401, True), response.text
    assert (await world.exchange(fresh, secret="x")).json()["detail"] == (
        "not the secret or the token of an active pilot"
    )


async def test_too_many_requests_of_a_pilot_or_address_are_refused_with_the_time_to_wait(world: World) -> None:
    limited = PilotRates(RequestRate("address", 6), RequestRate("pilot", 3))
    world.app.dependency_overrides[pilot_rates] = lambda: limited
    (_, mine), (_, others) = await world.submit(), await world.submit()
    token = await world.token(others)
    responses = [await world.exchange(mine, secret="x") for _ in range(4)]
    assert [response.status_code for response in responses] == [401, 401, 401, 429]
    assert 0 < int(responses[-1].headers["Retry-After"]) <= 60
    assert (await world.exchange(others)).status_code == 200  # another pilot is not kept out
    assert (await world.exchange(others)).status_code == 429  # but its whole address is, now
    reports = [(await world.report(token)).status_code for _ in range(4)]
    assert reports[-1] == 429


async def test_a_request_for_a_token_is_bounded_and_not_repeated_in_errors(world: World) -> None:
    for body in (
        {"stamp": "A" * 32, "secret": "s3cret-word"},
        {"stamp": "0" * 32, "secret": "s3cret-word", "refresh_token": "s3cret-word"},
        {"stamp": "0" * 32, "secret": "s3cret-word" * 20},
        {"stamp": "0" * 32, "secret": ["s3cret-word"]},
        {"stamp": "0" * 32},
        ["s3cret-word"],
    ):
        response = await world.client.post(f"{API}/token", json=body)
        assert (response.status_code, "s3cret" in response.text) == (422, False), response.text
    long = await world.client.post(f"{API}/token", content=b" " * 2_000_000)
    assert long.status_code == 413
