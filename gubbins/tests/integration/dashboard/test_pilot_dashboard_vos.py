"""Dashboard of pilots in the DiracX application, for operators of a VO and service administrators."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from diracx.core.properties import OPERATOR, SERVICE_ADMINISTRATOR
from diracx.tasks.operations.audit import read_audit
from diracx.tasks.web.dashboard.page import Form
from diracx.tasks.web.operator import NotPossibleError, Operator
from support.diracx_application import with_short_streams

from gubbins.dashboard.actions import ACTIONS
from gubbins.dashboard.read_models import READ_MODELS
from gubbins.db.sql import MyPilotDB
from gubbins.domain.circuit_breaker import CECall

BELOW = "http://diracx.example.org/api/tasks/dashboard"

SignIn = Callable[..., Any]


@pytest.fixture
async def pilots(sqlite_db: MyPilotDB) -> dict[str, int]:
    """One pilot of each VO, at a compute element of all and at one of its own."""
    await sqlite_db.add_ce("shared-ce", 5, 1.0)
    made = {}
    for vo in ("lhcb", "dteam"):
        await sqlite_db.add_ce(f"{vo}-ce", 5, 1.0, vos=[vo])
        await sqlite_db.submit_pilot("shared-ce", vo)
        made[vo] = await sqlite_db.submit_pilot(f"{vo}-ce", vo)
    return made


@pytest.fixture
async def sign_in(
    pilots: dict[str, int], sqlite_url: str, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[SignIn]:
    """`await sign_in("lhcb", OPERATOR)`: a browser with the dashboard of the application."""
    from cryptography.fernet import Fernet
    from diracx.core.config import ConfigSource
    from diracx.core.models import AccessTokenPayload
    from diracx.core.settings import AuthSettings
    from diracx.logic.auth.token import create_token
    from diracx.routers.factory import create_app
    from joserfc.jwk import KeySet, OKPKey
    from support.fixed_config import config_url
    from uuid_utils import uuid7

    key = OKPKey.generate_key("Ed25519", {"key_ops": ["sign", "verify"], "alg": "Ed25519", "kid": "k"})
    keystore = tmp_path / "keys.json"
    keystore.write_text(json.dumps(KeySet([key]).as_dict(private=True)))
    for name, value in {
        "CONFIG_BACKEND_URL": config_url(["lhcb", "dteam"]),
        "DB_URL_MYPILOTDB": sqlite_url,
        "TASKS_REDIS_URL": redis_url,
        "SERVICE_AUTH_TOKEN_KEYSTORE": f"file://{keystore}",
        "SERVICE_AUTH_STATE_KEY": Fernet.generate_key().decode(),
        "SERVICE_AUTH_TOKEN_ISSUER": "http://issuer.invalid",
        "SERVICE_AUTH_ALLOWED_REDIRECTS": "[]",
        **{
            f"SERVICE_{system}_ENABLED": "false"
            for system in ("AUTH", "CONFIG", "JOBS", "PILOTS", "RSS", "HEALTH", "MY_PILOTS")
        },
    }.items():
        monkeypatch.setenv(f"DIRACX_{name}", value)
    settings = AuthSettings()
    app = with_short_streams(create_app(), 0.1)
    app.dependency_overrides[ConfigSource.create].__self__.read()  # else the first response is 503
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    made: list[httpx.AsyncClient] = []

    async def browser(vo: str, *properties: str) -> httpx.AsyncClient:
        payload: Any = {
            "sub": f"{vo}:someone",
            "vo": vo,
            "iss": settings.token_issuer,
            "dirac_properties": list(properties),
            "jti": str(uuid7()),
            "preferred_username": "alice",
            "dirac_group": "users",
            "exp": int(time.time() + 600),
            "dirac_policies": {},
        }
        client = httpx.AsyncClient(transport=transport, base_url=BELOW)
        made.append(client)
        token = create_token(AccessTokenPayload(**payload), settings)
        assert (await client.post("/sign-in", data={"credential": token})).status_code == 303
        return client

    async with app.router.lifespan_context(app):
        yield browser
        for client in made:
            await client.aclose()


async def first_fragment(client: httpx.AsyncClient, page: str) -> str:
    """Return the first fragment of the live stream of a page; httpx sees the whole of a stream only."""
    response = await client.get(f"/live{page}")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    return response.text


async def test_an_operator_sees_only_pilots_and_compute_elements_of_the_own_vo(
    sign_in: SignIn, pilots: dict[str, int]
) -> None:
    client = await sign_in("lhcb", OPERATOR)
    for page in ("/pilots", "/pilots?vo=lhcb", "/pilots/list", f"/pilots/{pilots['lhcb']}"):
        for text in (
            (await client.get(page)).text,
            await first_fragment(client, page),
        ):
            assert "lhcb-ce" in text, page
            assert "dteam" not in text, page
    assert "2 pilots" in (await client.get("/pilots/list")).text
    for action in ("open", "close", "ban"):
        assert f"/pilots/ce/{action}" not in (await client.get("/pilots")).text
    assert "dteam-ce" not in (await client.get("/pilots?ce=-ce")).text
    assert (await client.get(f"/pilots/{pilots['lhcb']}/output")).status_code == 200
    unseen = (await client.get(f"/pilots/{pilots['dteam']}/output")).text
    assert "There is no pilot" in unseen
    for page in ("/pilots?vo=dteam", "/pilots/list?vo=dteam", f"/pilots/{pilots['dteam']}"):
        response = await client.get(page)
        assert response.status_code == 404, page
        assert "dteam-ce" not in response.text, page
        assert "dteam-ce" not in await first_fragment(client, page), page
    unknown = (await client.get("/pilots/987654")).text
    foreign = (await client.get(f"/pilots/{pilots['dteam']}")).text
    assert "There is no pilot" in unknown
    assert "There is no pilot" in foreign


async def test_an_operator_sees_the_circuits_of_the_own_vo(sign_in: SignIn, sqlite_db: MyPilotDB) -> None:
    own = {"vos": {"lhcb": {}, "dteam": {}}}
    await sqlite_db.set_ce("shared-ce", capacity=5, success_rate=1.0, settings=own, vos=["lhcb", "dteam"])
    pause = {"failures": 1, "pause_seconds": 3600, "max_pause_seconds": 3600, "vo": "dteam"}
    await sqlite_db.record_failure("shared-ce", CECall.SUBMIT, "the proxy has expired", **pause)
    for vo, name, seen in (
        ("lhcb", OPERATOR, False),
        ("dteam", OPERATOR, True),
        ("lhcb", SERVICE_ADMINISTRATOR, True),
    ):
        assert ("submit paused" in (await (await sign_in(vo, name)).get("/pilots")).text) is seen, (vo, name)


async def test_the_charts_of_an_operator_count_only_pilots_of_the_own_vo(sign_in: SignIn) -> None:
    def submitted(text: str) -> int:
        [line] = [line for line in text.splitlines() if line.startswith('data: {"slots"')]
        charts = json.loads(line.removeprefix("data: "))
        return sum(charts["flow"]["series"][0]["values"])

    seen = [
        submitted(await first_fragment(await sign_in("lhcb", name), "/pilots"))
        for name in (OPERATOR, SERVICE_ADMINISTRATOR)
    ]
    assert seen == [2, 4]


async def test_a_service_administrator_sees_the_pilots_of_all_vos(sign_in: SignIn, pilots: dict[str, int]) -> None:
    client = await sign_in("lhcb", SERVICE_ADMINISTRATOR)
    for page in ("/pilots", "/pilots?vo=dteam", "/pilots/list", f"/pilots/{pilots['dteam']}"):
        assert "dteam-ce" in (await client.get(page)).text, page
        assert "dteam-ce" in await first_fragment(client, page), page


async def test_an_operator_of_one_vo_neither_cancels_pilots_of_another_nor_closes_compute_elements(
    sqlite_db: MyPilotDB, pilots: dict[str, int], redis_url: str
) -> None:
    from diracx.tasks.plumbing.broker import RedisStreamBroker
    from diracx.tasks.plumbing.config.reader import ConfigReader
    from diracx.tasks.plumbing.registry import TaskRegistry
    from diracx.tasks.web.context import AppContext

    do = {action.path: action.do for action in ACTIONS}
    broker = RedisStreamBroker(redis_url)
    READ_MODELS.use(sqlite_db)
    try:
        operator = Operator(AppContext(broker, TaskRegistry.of({}), ConfigReader()), "alice", "dashboard", "lhcb")
        with pytest.raises(NotPossibleError, match="unknown pilot"):
            await do["/pilots/cancel"](Form({"pilot": [str(pilots["dteam"])]}), operator)
        for action in ("close", "ban"):
            with pytest.raises(NotPossibleError, match="all VOs"):
                await do[f"/pilots/ce/{action}"](Form({"ce": ["shared-ce"], "reason": ["flood"]}), operator)
        assert (await sqlite_db.get_pilot(pilots["dteam"]))["cancel_requested_at"] is None
        assert (await sqlite_db.get_ce("shared-ce"))["enabled"]
        # Only what was done is in an audit log, and in that of the VO.
        assert await read_audit(broker.redis) == await read_audit(broker.redis, vo="lhcb") == []
        assert "requested" in await do["/pilots/cancel"](Form({"pilot": [str(pilots["lhcb"])]}), operator)
        assert await read_audit(broker.redis) == []
        assert [entry.action for entry in await read_audit(broker.redis, vo="lhcb")] == ["cancel pilot"]
    finally:
        READ_MODELS.use(None)
        await broker.shutdown()
