"""Access of each role to each route about pilots, as in docs/reference/who-may-see-what.md."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from diracx.core.properties import NORMAL_USER, OPERATOR, SERVICE_ADMINISTRATOR
from diracx.tasks.web.api.responses import MAX_BODY_BYTES
from support.diracx_application import set_environment, token_maker, with_short_streams
from support.permission_tables import BELOW, REFUSED, client_with, rows

from gubbins.dashboard.actions import ACTIONS
from gubbins.dashboard.pages import PAGES
from gubbins.db.sql import MyPilotDB
from gubbins.db.sql.outputs import Output
from gubbins.domain import clock
from gubbins.domain.circuit_breaker import CECall
from gubbins.logic.my_pilots import add_downtime
from gubbins.routers.my_pilots import router

pytestmark = pytest.mark.usefixtures("inline_sqlite")

API = "/api/my_pilots"
VOS = ("lhcb", "dteam")
ROLES = {
    "anonymous": (),
    "user": (NORMAL_USER,),
    "operator": (OPERATOR,),
    "administrator": (SERVICE_ADMINISTRATOR,),
}
START, END = ((datetime.now(UTC) + timedelta(days=days)).isoformat(timespec="seconds") for days in (30, 31))
BODIES: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "/ces": lambda vo, owner: {"name": f"{vo}.{owner}", "capacity": 1},
    "/report": lambda vo, owner: {},
    "/ces/{ce_name}/downtimes": lambda vo, owner: {"starts_at": START, "ends_at": END, "reason": "new switches"},
}
SITE_ERROR = "what-the-site-said"


ROUTES, SHOWN = rows(f"HTTP below `{API}`", ROLES), rows("Pages about pilots", ROLES)


def test_every_route_about_pilots_is_in_the_table() -> None:
    routes: Any = router.routes
    assert sorted(map(str, ROUTES)) == sorted(
        f"{method} {each.path}" for each in routes for method in each.methods
    )
    pages = [f"GET {page.path}" for page in PAGES] + [f"POST {action.path}" for action in ACTIONS]
    assert sorted(map(str, SHOWN)) == sorted(pages)


@dataclass(frozen=True)
class World:
    """Each VO has a pilot at a compute element of its own and one at one that serves both."""

    app: Any
    db: MyPilotDB
    pilots: dict[str, int]
    stamps: dict[str, str]

    async def planned(self, owner: str) -> int:
        """A new downtime, far away, of the compute element of that VO."""
        start = clock.now() + timedelta(days=1)
        end = start + timedelta(hours=1)
        downtime = await add_downtime(self.db, f"{owner}-ce", start, end, "new switches", by="alice")
        return downtime.id

    def marks(self, text: str) -> set[str]:
        """The VOs of which something is in the text."""
        return {vo for vo in VOS if re.search(rf"\b{vo}\b|{self.stamps[vo]}", text)}

    @asynccontextmanager
    async def user(self, role: str, vo: str) -> AsyncIterator[httpx.AsyncClient]:
        """A client of that role."""
        token = None if role == "anonymous" else token_maker()(*ROLES[role], vo=vo)
        async with client_with(self.app, token) as client:
            yield client


@pytest.fixture
async def world(
    sqlite_db: MyPilotDB, sqlite_url: str, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    from diracx.core.config import ConfigSource
    from diracx.routers.factory import create_app
    from support.fixed_config import config_url

    db = sqlite_db
    await db.add_ce("shared", 9, 1.0, rules={"vos": {"lhcb": {"share": 2}, "dteam": {"share": 3}}})
    breaker = {"failures": 9, "pause_seconds": 60, "max_pause_seconds": 60}
    pilots, stamps = {}, {}
    for vo in VOS:
        await db.add_ce(f"{vo}-ce", 9, 1.0, vos=[vo])
        pilots[vo] = await db.submit_pilot(f"{vo}-ce", vo)
        stamps[vo] = (await db.get_pilot(pilots[vo]))["stamp"]
        await db.request_cancels([(await db.submit_pilot("shared", vo), f"an error of {vo}")])
        await db.queue_outputs([pilots[vo]])
        await db.store_outputs([Output(pilots[vo], clock.now(), f"the output of {vo}", "")])
    await db.record_failure("shared", CECall.STATUS, SITE_ERROR, **breaker)
    set_environment(monkeypatch, tmp_path, redis_url, config_url(VOS))
    monkeypatch.setenv("DIRACX_DB_URL_MYPILOTDB", sqlite_url)
    monkeypatch.setenv("DIRACX_SERVICE_MY_PILOTS_ENABLED", "true")
    app = with_short_streams(create_app(), 0.02)
    app.dependency_overrides[ConfigSource.create].__self__.read()  # else the first response is 503
    async with app.router.lifespan_context(app):
        yield World(app, db, pilots, stamps)


@pytest.mark.parametrize("role", ROLES)
async def test_each_role_has_access_by_http_as_in_the_table(world: World, role: str) -> None:
    wrong = []
    for vo in VOS:
        for owner in VOS:
            await world.db.set_ce_enabled(f"{owner}-ce", True)
        async with world.user(role, vo) as client:
            for row in ROUTES:
                cell = row.cells[role]
                for owner in VOS:
                    names = {"pilot_id": world.pilots[owner], "ce_name": f"{owner}-ce"}
                    path = row.path.format(downtime_id=await world.planned(owner), **names)
                    body = (
                        BODIES.get(row.path, lambda vo, owner: None)(vo, owner) if row.method == "POST" else None
                    )
                    response = await client.request(row.method, API + path, json=body)
                    of_one = "{" in row.path
                    if cell == REFUSED:
                        allowed = {401 if role == "anonymous" else 403}
                    elif cell == "own VO" and of_one and owner != vo:
                        allowed = {404}
                    elif cell == "all" and row.path.startswith("/submit") and owner != vo:
                        allowed = {403}  # pilots are submitted for the VO of the token
                    elif cell == "anyone":
                        allowed = {422}  # it wants the secret of a pilot
                    else:
                        allowed = {200, 201, 202, 204}
                    case = f"{row} of {owner}, {role} of {vo}: {response.status_code} {response.text[:300]}"
                    if response.status_code not in allowed:
                        wrong.append(case)
                    if cell == "own VO" and (
                        not world.marks(
                            response.text.replace(f"{owner}-ce", "") if 404 in allowed else response.text
                        )
                        <= {vo}
                        or SITE_ERROR in response.text
                    ):
                        wrong.append(f"sees another VO's, {case}")
                    if (
                        cell == "all"
                        and row.method == "GET"
                        and not of_one
                        and world.marks(response.text) != {*VOS}
                    ):
                        wrong.append(f"does not see all, {case}")
                    if allowed == {404}:
                        missing = row.path.format(pilot_id=987654321, ce_name="nowhere")
                        unknown = await client.request(row.method, API + missing, json=body)
                        same = unknown.text.replace("987654321", str(world.pilots[owner]))
                        if response.text != same.replace("nowhere", f"{owner}-ce"):
                            wrong.append(f"tells that there is one, {case}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("role", ROLES)
async def test_each_role_has_access_in_the_dashboard_as_in_the_table(
    world: World, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    live_pages = {page.path for page in PAGES if page.live}
    wrong = []
    for vo in VOS:
        async with world.user(role, vo) as client:
            signed_in = role in ("operator", "administrator")
            form = re.search(r'name="form_token" value="(\w+)"', (await client.get(f"{BELOW}/pilots")).text)
            assert (form is not None) == signed_in
            for row in SHOWN:
                cell = row.cells[role]
                for owner in VOS:
                    path = row.path.format(pilot=world.pilots[owner])
                    if row.method == "POST":
                        fields = {
                            "form_token": form[1] if form else "",
                            "confirmed": "yes",
                            "reason": f"{START} {END} a flood",
                        }
                        fields |= {"pilot": str(world.pilots[owner]), "ce": f"{owner}-ce"}
                        fields |= {"downtime": str(await world.planned(owner))}
                        response = await client.post(BELOW + path, data=fields)
                        if response.status_code != (303 if cell == "all" else 403 if signed_in else 401):
                            wrong.append(f"{row} of {owner}, {role} of {vo}: {response.status_code}")
                        continue
                    hidden = cell == "own VO" and "{" in row.path and owner != vo
                    expected = 303 if cell == REFUSED else 404 if hidden else 200
                    for prefix in ("", "/live") if row.path in live_pages else ("",):
                        response = await client.get(f"{BELOW}{prefix}{path}")
                        case = f"{prefix}{row} of {owner}, {role} of {vo}: {response.status_code}"
                        if response.status_code != (200 if prefix and hidden else expected):
                            wrong.append(case)
                        if cell == "own VO" and not world.marks(response.text) <= {vo}:
                            wrong.append(f"sees another VO's, {case}")
                        if cell == "own VO" and SITE_ERROR in response.text:
                            wrong.append(f"sees what the site said, {case}")
                        if cell == "all" and "{" not in row.path and world.marks(response.text) != {*VOS}:
                            wrong.append(f"does not see all, {case}")
    assert not wrong, "\n".join(wrong)


async def test_a_vo_sees_only_its_own_rules_and_no_messages_of_a_shared_compute_element(world: World) -> None:
    async with world.user("user", "lhcb") as client:
        [listed] = [ce for ce in (await client.get(f"{API}/ces")).json() if ce["name"] == "shared"]
        shown = (await client.get(f"{API}/ces/shared")).json()
        refused = await client.post(f"{API}/submit/shared")
    assert listed["rules"] == {"share": 2}
    assert (shown["rules"]["share"], "vos" in shown["rules"]) == (2, False)
    for ce in (listed, shown):
        assert (ce["last_error"], ce["vos"], ce["circuits"]["status"]["last_error"]) == (None, None, None)
        assert ce["circuits"]["status"]["failures"] == 1
        assert ce["last_error_at"] is not None
    assert refused.status_code == 409
    assert "its status cannot be read" in refused.json()["detail"]
    assert SITE_ERROR not in refused.text
    async with world.user("operator", "lhcb") as client:
        assert "only administrators see the message" in (await client.get(f"{BELOW}/pilots")).text
    async with world.user("administrator", "lhcb") as client:
        shown = (await client.get(f"{API}/ces/shared")).json()
        assert SITE_ERROR in (await client.post(f"{API}/submit/shared")).text
    assert (shown["last_error"], shown["rules"]["vos"]["dteam"]["share"]) == (SITE_ERROR, 3)


async def test_a_list_of_another_vo_is_refused_whether_it_exists_or_not(world: World) -> None:
    async with world.user("user", "lhcb") as client:
        responses = [await client.get(f"{API}/pilots", params={"vo": vo}) for vo in ("dteam", "nowhere")]
    assert [response.status_code for response in responses] == [403, 403]
    assert responses[0].text == responses[1].text


async def test_a_refusal_by_an_extension_policy_is_a_404(world: World) -> None:
    from diracx.tasks.web.auth.policies import forbidden

    from gubbins.routers.access_policies import MyPilotsAccessPolicy

    async def policy(vo: str | None = None, **_: Any) -> None:
        if vo is not None:
            raise forbidden("only for those on shift")

    world.app.dependency_overrides[MyPilotsAccessPolicy.check] = lambda: policy
    async with world.user("user", "lhcb") as client:
        responses = [await client.get(f"{API}/pilots/{number}") for number in (world.pilots["lhcb"], 987654321)]
    assert [response.status_code for response in responses] == [404, 404]


@pytest.mark.parametrize("role", ["anonymous", "user", "administrator"])
async def test_a_too_long_body_is_refused_before_it_is_read(world: World, role: str) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 100 * MAX_BODY_BYTES:
            sent += 100_000
            yield b" " * 100_000

    async with world.user(role, "lhcb") as client:
        headers = {"Content-Type": "application/json"}
        response = await client.post(f"{API}/ces", content=endless(), headers=headers)
    assert response.status_code == 413, response.text
    assert sent < 2 * MAX_BODY_BYTES
