"""DiracX's own routes about pilots in the real application, and jobs of pilots in ours."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from diracx.core.properties import NORMAL_USER, OPERATOR, SERVICE_ADMINISTRATOR
from diracx.db.sql import PilotAgentsDB
from diracx.db.sql.pilots.schema import JobToPilotMapping
from sqlalchemy import insert, text
from support.diracx_application import HOME, make_application, set_environment, token_maker
from support.fixed_config import config_url

from gubbins.db.sql import MyPilotDB
from gubbins.logic import my_pilots as logic
from gubbins.tasks.my_pilots import MyCheckPilotsTask

VOS = ("lhcb", "dteam")


@dataclass(frozen=True)
class World:
    """Each VO has a pilot that runs, on which a job of it ran, and one that waits."""

    app: Any
    registry: PilotAgentsDB
    running: dict[str, int]
    stamps: dict[str, set[str]]
    token: Callable[..., str]

    def as_(self, vo: str, *properties: str) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {self.token(*properties or (NORMAL_USER,), vo=vo)}"}
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url=HOME, headers=headers)


@pytest.fixture(params=["sqlite", "mariadb"])
async def world(
    request: pytest.FixtureRequest,
    empty_database: Callable[[str], Awaitable[str]],
    registry_at: Any,
    redis_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[World]:
    """DiracX 0.7 takes no URL of a PostgreSQL server."""
    kind: str = request.param
    url, registry_url = await empty_database(kind), await empty_database(kind)
    set_environment(monkeypatch, tmp_path, redis_url, config_url(VOS))
    monkeypatch.setenv("DIRACX_DB_URL_MYPILOTDB", url)
    monkeypatch.setenv("DIRACX_DB_URL_PILOTAGENTSDB", registry_url)
    for service in ("PILOTS", "MY_PILOTS"):
        monkeypatch.setenv(f"DIRACX_SERVICE_{service}_ENABLED", "true")
    db = MyPilotDB(url)
    async with db.engine_context(), registry_at(registry_url) as registry:
        await db.create_tables()
        await db.add_ce("ce", 9, 1.0)
        running, stamps = {}, {}
        for number, vo in enumerate(VOS):
            running[vo] = await db.submit_pilot("ce", vo)
            await MyCheckPilotsTask(vo).execute(my_pilot_db=db)
            waiting = await db.submit_pilot("ce", vo)
            await db.confirm_pilots([(waiting, f"job {number}")])
            stamps[vo] = {(await db.get_pilot(each))["stamp"] for each in (running[vo], waiting)}
        # Before the simulated compute element says more of them.
        for vo in VOS:
            await logic.update_registry(db, registry, vo)
            registry_id = (await db.get_pilot(running[vo]))["registry_id"]
            jobs = [100 + VOS.index(vo), 7]  # one of each, and one that has run on pilots of both
            rows = [{"PilotID": registry_id, "JobID": job, "StartTime": datetime.now(UTC)} for job in jobs]
            async with registry.engine.begin() as connection:
                await connection.execute(insert(JobToPilotMapping), rows)
        app = make_application()
        async with app.router.lifespan_context(app):
            yield World(app, registry, running, stamps, token_maker())


async def search(client: httpx.AsyncClient, body: Any = None) -> dict[str, dict[str, Any]]:
    response = await client.post("/api/pilots/search", json=body or {})
    assert response.status_code == 200, response.text
    return {row["PilotStamp"]: row for row in response.json()}


async def test_diracx_finds_pilots_of_the_own_vo_and_administrators_find_all(world: World) -> None:
    for vo in VOS:
        async with world.as_(vo) as client:
            found = await search(client)
            assert found.keys() == world.stamps[vo]
            assert {(row["VO"], row["GridType"], row["DestinationSite"]) for row in found.values()} == {
                (vo, "simulated", "ce")
            }
            assert {row["Status"] for row in found.values()} == {"Running", "Waiting"}
            counts = await client.post("/api/pilots/summary", json={"grouping": ["VO", "Status"]})
            assert sorted((row["VO"], row["Status"], row["count"]) for row in counts.json()) == [
                (vo, "Running", 1),
                (vo, "Waiting", 1),
            ]
    async with world.as_("lhcb", SERVICE_ADMINISTRATOR) as client:
        assert (await search(client)).keys() == world.stamps["lhcb"] | world.stamps["dteam"]
        counts = await client.post("/api/pilots/summary", json={"grouping": ["Status"]})
        assert {row["Status"]: row["count"] for row in counts.json()} == {"Running": 2, "Waiting": 2}


async def test_diracx_finds_the_pilot_of_a_job(world: World) -> None:
    async with world.as_("lhcb") as client:
        body = {"search": [{"parameter": "JobID", "operator": "eq", "value": 100}]}
        [found] = (await search(client, body)).values()
        assert found["Status"] == "Running"


async def test_jobs_of_a_pilot_and_pilots_of_a_job_are_limited_to_the_own_vo(world: World) -> None:
    async with world.as_("lhcb") as client:
        pilot = await client.get(f"/api/my_pilots/pilots/{world.running['lhcb']}")
        assert pilot.json()["jobs"] == [100, 7]
        for job, vo in ((100, "lhcb"), (7, "lhcb")):
            page = (await client.get("/api/my_pilots/pilots", params={"job_id": job})).json()
            assert [item["pilot_id"] for item in page["items"]] == [world.running[vo]]
            assert page["total"] == 1
        for unknown in (101, 4711):  # another VO's job, and none at all
            page = (await client.get("/api/my_pilots/pilots", params={"job_id": unknown})).json()
            assert (page["items"], page["total"]) == ([], 0)
        assert (await client.get("/api/my_pilots/pilots", params={"job_id": 0})).status_code == 422
    async with world.as_("lhcb", SERVICE_ADMINISTRATOR) as client:
        page = (await client.get("/api/my_pilots/pilots", params={"job_id": 7})).json()
        assert {item["pilot_id"] for item in page["items"]} == {*world.running.values()}


async def test_the_dashboard_shows_jobs_of_a_pilot_and_pilots_of_a_job(world: World) -> None:
    below = "/api/tasks/dashboard"
    async with world.as_("lhcb", OPERATOR) as client:
        await client.post(f"{below}/sign-in", data={"credential": world.token(OPERATOR, vo="lhcb")})
        pilot = await client.get(f"{below}/pilots/{world.running['lhcb']}")
        assert "pilots/list?job=100" in pilot.text
        listed = await client.get(f"{below}/pilots/list", params={"job": "7"})
        assert "1 pilots" in listed.text
        assert f'{below}/pilots/{world.running["dteam"]}"' not in listed.text
        assert "No pilots match." in (await client.get(f"{below}/pilots/list?job=101")).text
        assert (await client.get(f"{below}/pilots/list?job=x")).status_code == 404


async def test_an_unavailable_registry_is_an_error_only_for_jobs(world: World) -> None:
    async with world.registry.engine.begin() as connection:
        await connection.execute(text("DROP TABLE JobToPilotMapping"))
    async with world.as_("lhcb") as client:
        pilot = await client.get(f"/api/my_pilots/pilots/{world.running['lhcb']}")
        assert (pilot.status_code, pilot.json()["jobs"]) == (200, None)
        refused = await client.get("/api/my_pilots/pilots", params={"job_id": 7})
        assert refused.status_code == 503
        assert "PilotAgentsDB" in refused.json()["detail"]
        assert "it says" not in refused.json()["detail"]
    below = "/api/tasks/dashboard"
    async with world.as_("lhcb", OPERATOR) as client:
        await client.post(f"{below}/sign-in", data={"credential": world.token(OPERATOR, vo="lhcb")})
        assert (await client.get(f"{below}/pilots/{world.running['lhcb']}")).status_code == 200
        assert "Cannot find the pilots of a job" in (await client.get(f"{below}/pilots/list?job=7")).text
