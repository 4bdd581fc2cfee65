"""Routes about pilots in the real DiracX application, with its tokens, configuration and access policy."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from diracx.core.properties import NORMAL_USER, SERVICE_ADMINISTRATOR
from diracx.tasks.operations.audit import AuditEntry, read_audit
from diracx.tasks.web.api import environment
from pydantic import TypeAdapter
from redis.asyncio import Redis
from support.hostile_requests import hostile_addresses, hostile_bodies, unbounded_in

from gubbins.db.sql import MyPilotDB
from gubbins.domain.circuit_breaker import CECall
from gubbins.domain.downtimes import Downtime

As = Callable[..., dict[str, str]]
VOS = ("lhcb", "dteam")
#: What the kind of database has no part in.
on_sqlite = pytest.mark.parametrize("api_db_url", ["sqlite"], indirect=True)


@pytest.fixture(params=["sqlite", "mariadb"])
async def api_db_url(request: pytest.FixtureRequest, empty_database: Callable[[str], Awaitable[str]]) -> str:
    """DiracX 0.7 takes no URL of a PostgreSQL server."""
    return await empty_database(request.param)


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, api_db_url: str) -> Any:
    """The application as `uvicorn --factory diracx.routers.factory:create_app` starts it."""
    from cryptography.fernet import Fernet
    from diracx.core.config import ConfigSource
    from diracx.routers.factory import create_app
    from joserfc.jwk import KeySet, OKPKey
    from support.fixed_config import config_url

    key = OKPKey.generate_key("Ed25519", {"key_ops": ["sign", "verify"], "alg": "Ed25519", "kid": "k"})
    keystore = tmp_path / "keys.json"
    keystore.write_text(json.dumps(KeySet([key]).as_dict(private=True)))
    for name, value in {
        "CONFIG_BACKEND_URL": config_url(VOS),
        "DB_URL_MYPILOTDB": api_db_url,
        "SERVICE_AUTH_TOKEN_KEYSTORE": f"file://{keystore}",
        "SERVICE_AUTH_STATE_KEY": Fernet.generate_key().decode(),
        "SERVICE_AUTH_TOKEN_ISSUER": "http://issuer.invalid",
        "SERVICE_AUTH_ALLOWED_REDIRECTS": "[]",
        **{
            f"SERVICE_{system}_ENABLED": "false"
            for system in ("AUTH", "CONFIG", "JOBS", "PILOTS", "RSS", "HEALTH")
        },
    }.items():
        monkeypatch.setenv(f"DIRACX_{name}", value)
    application = create_app()
    # Warm: the first reader would get a 503.
    application.dependency_overrides[ConfigSource.create].__self__.read()
    return application


@pytest.fixture
def client(app: Any) -> Iterator[Any]:
    from fastapi.testclient import TestClient

    with TestClient(app) as test_client:
        db = _database(app)
        test_client.portal.call(db.create_tables)
        test_client.portal.call(db.add_ce, "ce", 2, 1.0)
        yield test_client


def _database(app: Any) -> MyPilotDB:
    return next(
        function.__self__
        for function in app.lifetime_functions
        if isinstance(getattr(function, "__self__", None), MyPilotDB)
    )


@pytest.fixture
def as_(app: Any) -> As:
    """Headers with a token: `as_("lhcb")`, `as_("dteam", SERVICE_ADMINISTRATOR)`."""
    from diracx.core.models import AccessTokenPayload
    from diracx.core.settings import AuthSettings
    from diracx.logic.auth.token import create_token
    from uuid_utils import uuid7

    def headers(vo: str = "lhcb", *properties: str) -> dict[str, str]:
        settings = AuthSettings()
        payload = AccessTokenPayload(
            sub=f"{vo}:someone",
            vo=vo,
            iss=settings.token_issuer,
            dirac_properties=list(properties or (NORMAL_USER,)),
            jti=str(uuid7()),
            preferred_username="alice",
            dirac_group="user",
            exp=datetime.now(tz=UTC) + timedelta(minutes=5),
            dirac_policies={},
        )
        return {"Authorization": f"Bearer {create_token(payload, settings)}"}

    return headers


API = "/api/my_pilots"


def test_P63_unknown_ce_is_404_and_a_full_one_409(client: Any, as_: As) -> None:
    assert client.post(f"{API}/submit/unknown", headers=as_()).status_code == 404
    for _ in range(2):
        response = client.post(f"{API}/submit/ce", headers=as_())
        assert response.status_code == 200, response.text
        assert response.json()["vo"] == "lhcb"
    full = client.post(f"{API}/submit/ce", headers=as_("dteam"))
    assert full.status_code == 409
    assert "no room" in full.json()["detail"]
    summary = client.get(f"{API}/summary", headers=as_()).json()
    by_ce = {"lhcb": {"ce": {"SUBMITTED": 2}}}
    assert summary == {"pilots": by_ce, "totals": {"SUBMITTED": 2}, "reports": {}, "SUBMITTED": 2}


def test_a_submission_refused_by_a_rule_names_the_rule_and_its_value(client: Any, as_: As) -> None:
    admin = as_("lhcb", SERVICE_ADMINISTRATOR)
    for rule, status in (("max_waiting", 409), ("max_per_cycle", 429)):
        spec = {"name": rule, "capacity": 9, "rules": {rule: 1}}
        assert client.post(f"{API}/ces", json=spec, headers=admin).status_code == 201
        assert client.post(f"{API}/submit/{rule}", headers=as_()).status_code == 200
        refused = client.post(f"{API}/submit/{rule}", headers=as_())
        assert refused.status_code == status
        assert f"rule {rule} is 1" in refused.json()["detail"]
        assert (0 < int(refused.headers.get("Retry-After", 0)) <= 60) is (status == 429)


ROUTES: list[tuple[str, str, Any]] = [
    ("POST", "/submit/ce", None),
    ("GET", "/summary", None),
    ("GET", "/pilots", None),
    ("GET", "/pilots/1", None),
    ("POST", "/pilots/1/cancel", None),
    ("GET", "/ces", None),
    ("POST", "/ces", {"name": "x", "capacity": 1}),
    ("POST", "/ces/ce/enable", None),
    ("POST", "/ces/ce/disable", None),
    ("POST", "/ces/ce/ban", {"reason": "x"}),
    ("GET", "/ces/ce", None),
    ("GET", "/pilots/99/output", None),
]


@on_sqlite
def test_P63_every_route_requires_a_token_a_known_vo_and_a_property(client: Any, as_: As) -> None:
    anonymous = [None, {"Authorization": "Bearer invalid"}]
    strangers = [as_("unknown", SERVICE_ADMINISTRATOR), as_("lhcb", "GenericPilot")]
    for method, path, body in ROUTES:
        found = [
            client.request(method, API + path, json=body, headers=headers).status_code
            for headers in (*anonymous, *strangers, as_(), as_("lhcb", SERVICE_ADMINISTRATOR))
        ]
        assert found[:4] == [401, 401, 403, 403], path
        managing = path.startswith("/ces") and method == "POST"
        assert (found[4] == 403) is managing, path
        assert found[5] in (200, 201, 202, 204, 404), path


def test_P63_a_vo_can_access_only_its_own_pilots(client: Any, as_: As) -> None:
    pilot_id = client.post(f"{API}/submit/ce", headers=as_()).json()["pilot_id"]
    theirs, admin = as_("dteam"), as_("dteam", SERVICE_ADMINISTRATOR)
    assert client.get(f"{API}/pilots/{pilot_id}", headers=theirs).status_code == 404
    assert client.post(f"{API}/pilots/{pilot_id}/cancel", headers=theirs).status_code == 404
    assert client.get(f"{API}/pilots?vo=lhcb", headers=theirs).status_code == 403
    assert client.get(f"{API}/pilots", headers=theirs).json()["total"] == 0
    assert client.get(f"{API}/summary", headers=theirs).json()["pilots"] == {}
    assert client.get(f"{API}/pilots/{pilot_id}", headers=admin).status_code == 200
    assert client.get(f"{API}/pilots?vo=lhcb", headers=admin).json()["total"] == 1


def test_pilots_are_paged_filtered_shown_and_cancelled(client: Any, as_: As) -> None:
    ids = [client.post(f"{API}/submit/ce", headers=as_()).json()["pilot_id"] for _ in range(2)]
    response = client.get(f"{API}/pilots?per_page=1&page=2&status=SUBMITTED&ce_name=ce", headers=as_())
    assert [pilot["pilot_id"] for pilot in response.json()["items"]] == [ids[0]]
    assert response.json()["total"] == 2
    assert response.headers["Content-Range"] == "pilots 1-1/2"
    beyond = client.get(f"{API}/pilots?page=9", headers=as_())
    assert (beyond.json()["items"], beyond.headers["Content-Range"]) == ([], "pilots */2")
    pilot = client.get(f"{API}/pilots/{ids[0]}", headers=as_()).json()
    assert [step["status"] for step in pilot["history"]] == ["SUBMITTED"]
    assert datetime.fromisoformat(pilot["submitted_at"]).tzinfo is not None
    cancelled = client.post(f"{API}/pilots/{ids[0]}/cancel", headers=as_())
    assert cancelled.status_code == 202
    assert cancelled.json()["cancel_requested_at"]
    assert client.get(f"{API}/pilots/999", headers=as_()).status_code == 404


@on_sqlite
def test_every_action_is_in_the_audit_log_of_the_task_system(
    client: Any, as_: As, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIRACX_TASKS_REDIS_URL", redis_url)
    user, admin = as_(), as_("lhcb", SERVICE_ADMINISTRATOR)
    assert client.post(f"{API}/submit/ce", headers=user).status_code == 200
    assert client.post(f"{API}/submit/nowhere", headers=user).status_code == 404
    assert client.post(f"{API}/pilots/1/cancel", headers=user).status_code == 202
    assert client.post(f"{API}/ces/ce/disable", headers=user).status_code == 403  # was not begun
    assert client.post(f"{API}/ces", json={"name": "new", "capacity": 3}, headers=admin).status_code == 201
    for verb in ("disable", "enable", "ban"):
        assert client.post(f"{API}/ces/ce/{verb}", headers=admin).status_code == 204
    client.get(f"{API}/ces", headers=admin)

    async def look() -> list[AuditEntry]:
        async with Redis.from_url(redis_url) as redis:
            return [*await read_audit(redis), *await read_audit(redis, vo="lhcb")]

    entries = asyncio.run(look())[::-1]
    assert {(entry.who, entry.via) for entry in entries} == {("alice (lhcb:someone)", "api")}
    assert [(entry.action, entry.target, entry.ok) for entry in entries] == [
        ("submit pilot", "ce", True),
        ("submit pilot", "nowhere", False),
        ("cancel pilot", "1", True),
        ("create compute element", "new", True),
        ("close compute element", "ce", True),
        ("open compute element", "ce", True),
        ("ban compute element", "ce", True),
    ]
    assert entries[0].outcome == "pilot 1 of lhcb"
    monkeypatch.setenv("DIRACX_TASKS_REDIS_URL", "redis://127.0.0.1:1")
    environment.contexts.clear()
    assert client.post(f"{API}/ces/ce/enable", headers=admin).status_code == 503
    assert client.get(f"{API}/ces/ce", headers=admin).json()["banned_at"] is not None


@on_sqlite
def test_bad_queries_are_422(client: Any, as_: As) -> None:
    for query in ("page=0", "per_page=0", "per_page=100000", "status=LOST", "page=x", "page=99999999999999"):
        assert client.get(f"{API}/pilots?{query}", headers=as_()).status_code == 422, query


def test_ces_are_created_opened_and_closed_by_administrators(client: Any, as_: As) -> None:
    admin = as_("lhcb", SERVICE_ADMINISTRATOR)
    body = {"name": "new", "capacity": 3, "vos": ["dteam"], "settings": {"run_seconds": 1}}
    created = client.post(f"{API}/ces", json=body, headers=admin)
    assert created.status_code == 201, created.text
    assert created.json()["available_slots"] == 3
    assert client.post(f"{API}/ces", json=body, headers=admin).status_code == 409
    names = lambda headers, query="": [  # noqa: E731
        ce["name"] for ce in client.get(f"{API}/ces{query}", headers=headers).json()
    ]
    assert names(as_()) == ["ce"]
    assert names(as_("dteam")) == ["ce", "new"]
    assert client.post(f"{API}/submit/new", headers=as_()).status_code == 404
    assert client.post(f"{API}/ces/new/disable", headers=admin).status_code == 204
    assert client.post(f"{API}/submit/new", headers=as_("dteam")).status_code == 409
    assert names(as_("dteam"), "?with_room=true") == ["ce"]
    assert client.post(f"{API}/ces/new/enable", headers=admin).status_code == 204
    assert client.post(f"{API}/submit/new", headers=as_("dteam")).status_code == 200
    assert client.post(f"{API}/ces/nope/enable", headers=admin).status_code == 404


@on_sqlite
def test_bad_ces_are_422_and_create_nothing(client: Any, as_: As) -> None:
    admin = as_("lhcb", SERVICE_ADMINISTRATOR)
    wrong: dict[str, dict[str, Any]] = {
        "capacity": {"capacity": -1},
        "success_rate": {"success_rate": 1.5},
        "colour": {"colour": "red"},
        "speed": {"settings": {"speed": 1}},
    }
    # The settings of `local` are commands on our own hosts: not for those who have no more than a token.
    for where, fields in (*wrong.items(), ("backend", {"backend": "nope"}), ("backend", {"backend": "local"})):
        response = client.post(f"{API}/ces", json={"name": "x", "capacity": 1} | fields, headers=admin)
        assert response.status_code == 422, fields
        assert response.json()["detail"][0]["loc"][-1] == where
    assert [ce["name"] for ce in client.get(f"{API}/ces", headers=admin).json()] == ["ce"]


def test_a_ce_is_shown_with_its_circuits_and_rules_and_can_be_banned(client: Any, as_: As) -> None:
    admin = as_("lhcb", SERVICE_ADMINISTRATOR)
    spec = {"name": "theirs", "capacity": 1, "vos": ["dteam"], "rules": {"vos": {"dteam": {"share": 2}}}}
    assert client.post(f"{API}/ces", json=spec, headers=admin).status_code == 201
    shown = client.get(f"{API}/ces/theirs", headers=as_("dteam")).json()
    assert shown["circuits"]["submit"]["state"] == "closed"
    assert (shown["rules"]["policy"], shown["rules"]["share"]) == ("fill", 2)
    for name in ("theirs", "none"):
        assert client.get(f"{API}/ces/{name}", headers=as_("lhcb")).status_code == 404
    assert client.post(f"{API}/ces/ce/ban", json={"reason": "flood"}, headers=admin).status_code == 204
    banned = client.get(f"{API}/ces/ce", headers=as_()).json()
    assert (banned["enabled"], banned["ban_reason"]) == (False, "flood")
    assert client.post(f"{API}/submit/ce", headers=as_()).status_code == 409
    assert client.post(f"{API}/ces/ce/enable", headers=admin).status_code == 204
    assert client.get(f"{API}/ces/ce", headers=as_()).json()["banned_at"] is None


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/token", {"stamp": 3, "secret": "s3cret-word"}),
        ("/token", {"stamp": "0" * 32, "secret": "s3cret-word", "more": 1}),
        ("/token", {"stamp": "0" * 32, "refresh_token": ["s3cret-word"]}),
        ("/token", "s3cret-word"),
        ("/ces", {"name": "new", "capacity": 1, "settings": "s3cret-word"}),
        ("/ces", {"name": "new", "capacity": 1, "settings": {"password": "s3cret-word"}}),
    ],
)
def test_an_invalid_request_is_neither_repeated_in_the_response_nor_logged(
    client: Any, as_: As, caplog: pytest.LogCaptureFixture, path: str, body: Any
) -> None:
    response = client.post(f"{API}{path}", json=body, headers=as_("lhcb", SERVICE_ADMINISTRATOR))
    assert response.status_code == 422, response.text
    assert response.json()["detail"]
    assert "s3cret" not in response.text + caplog.text


def test_a_downtime_is_planned_seen_and_removed(client: Any, as_: As) -> None:
    admin, now = as_("lhcb", SERVICE_ADMINISTRATOR), datetime.now(UTC)
    elsewhere = now.astimezone(timezone(timedelta(hours=2)))
    start, end = ((elsewhere + timedelta(hours=hours)).isoformat() for hours in (-1, 5))
    downtime = {"starts_at": start, "ends_at": end, "reason": "new switches", "drain_seconds": 60}
    added = client.post(f"{API}/ces/ce/downtimes", json=downtime, headers=admin)
    assert added.status_code == 201, added.text
    assert set(TypeAdapter(Downtime).json_schema()["required"]) == added.json().keys()
    assert datetime.fromisoformat(added.json()["drain_from"]) == now - timedelta(hours=1, seconds=60)
    assert client.get(f"{API}/downtimes", headers=as_()).json() == [added.json()]
    assert client.get(f"{API}/ces/ce", headers=as_()).json()["downtime"] == added.json()
    refused = client.post(f"{API}/submit/ce", headers=as_())
    assert (refused.status_code, "new switches" in refused.json()["detail"]) == (409, True)
    for wrong in ({"ends_at": start}, {"ends_at": "soon"}, {"reason": ""}, {"drain_seconds": -1}, {"x": 1}):
        assert client.post(f"{API}/ces/ce/downtimes", json=downtime | wrong, headers=admin).status_code == 422
    assert client.post(f"{API}/ces/none/downtimes", json=downtime, headers=admin).status_code == 404
    where = f"{API}/downtimes/{added.json()['id']}"
    assert [client.delete(where, headers=admin).status_code for _ in range(2)] == [204, 404]
    assert client.post(f"{API}/submit/ce", headers=as_()).status_code == 200


def test_a_submission_to_a_ce_of_another_vo_is_refused_as_unknown(app: Any, client: Any, as_: As) -> None:
    admin = as_("lhcb", SERVICE_ADMINISTRATOR)
    spec = {"name": "theirs", "capacity": 1, "vos": ["dteam"]}
    assert client.post(f"{API}/ces", json=spec, headers=admin).status_code == 201
    breaker = {"failures": 1, "pause_seconds": 60, "max_pause_seconds": 60}
    fail = partial(_database(app).record_failure, "theirs", CECall.STATUS, "no such user", **breaker)
    client.portal.call(fail)
    for_member, for_admin = [
        client.post(f"{API}/submit/theirs", headers=headers).json()["detail"]
        for headers in (as_("dteam"), as_("dteam", SERVICE_ADMINISTRATOR))
    ]
    assert "its status cannot be read" in for_member
    assert ("no such user" in for_member, "no such user" in for_admin) == (False, True)
    for change in (None, "enable", "disable"):
        if change is not None:
            assert client.post(f"{API}/ces/theirs/{change}", headers=admin).status_code == 204
        unknown, theirs = [client.post(f"{API}/submit/{name}", headers=as_()) for name in ("none", "theirs")]
        assert unknown.status_code == theirs.status_code == 404
        assert theirs.json()["detail"] == unknown.json()["detail"].replace("none", "theirs")
    response = client.post(f"{API}/submit/theirs", headers=admin)
    assert response.status_code == 403
    assert "does not serve" in response.json()["detail"]


def test_output_is_for_the_own_vo_and_404_if_there_is_none(client: Any, as_: As) -> None:
    pilot = client.post(f"{API}/submit/ce", headers=as_()).json()["pilot_id"]
    response = client.get(f"{API}/pilots/{pilot}/output", headers=as_())
    assert response.status_code == 404
    assert "keeps no output" in response.json()["detail"]
    unknown, theirs = [client.get(f"{API}/pilots/{id}/output", headers=as_("dteam")) for id in (999, pilot)]
    assert unknown.status_code == theirs.status_code == 404
    assert theirs.json()["detail"] == unknown.json()["detail"].replace("999", str(pilot))


@on_sqlite
def test_openapi_is_complete_with_examples(client: Any) -> None:
    schema = client.get("/api/openapi.json").json()
    routes = {path: item for path, item in schema["paths"].items() if path.startswith(API)}
    assert len(routes) == 16
    for path, item in routes.items():
        for operation in item.values():
            assert operation["description"], path
            assert {"401", "403"} <= operation["responses"].keys(), path
            for parameter in operation.get("parameters", []):
                assert parameter.get("description"), (path, parameter)
    for model in ("CEPublic", "CESpec", "Pilot", "PilotPage", "PilotWithHistory", "Submission", "Summary"):
        assert schema["components"]["schemas"][model]["examples"], model


@pytest.mark.enabled_dependencies(["AuthSettings", "MyPilotDB", "MyPilotsAccessPolicy", "DevelopmentSettings"])
def test_routes_run_in_the_client_factory_of_diracx(client_factory: Any) -> None:
    with client_factory.normal_user() as user:
        assert user.get(f"{API}/summary").json() == {"pilots": {}, "totals": {}, "reports": {}}
        assert user.post(f"{API}/ces", json={"name": "ce", "capacity": 1}).status_code == 201
        assert user.post(f"{API}/submit/ce").status_code == 200
        assert user.post(f"{API}/submit/ce").status_code == 409
        assert user.post(f"{API}/submit/unknown").status_code == 404
        assert user.get(f"{API}/summary").json()["totals"] == {"SUBMITTED": 1}


def _spoil(path: Path) -> None:
    """The file of the database is another file."""
    for end in ("-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)
    path.write_text("The quick brown fox jumps over the lazy dog. " * 200)


def _empty(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            if not name.startswith("sqlite_"):
                connection.execute(f'DROP TABLE "{name}"')
        connection.commit()


@on_sqlite
@pytest.mark.parametrize(
    ("harm", "says"),
    [(_empty, "is not initialised"), (_spoil, "is not an SQLite database")],
    ids=["empty", "spoilt"],
)
def test_an_unavailable_database_is_503_with_the_remedy(
    client: Any, app: Any, as_: As, api_db_url: str, harm: Callable[[Path], None], says: str, redis_url: str
) -> None:
    client.portal.call(_database(app).engine.dispose)
    harm(Path(api_db_url.partition("///")[2]))
    for method, path, body in ROUTES:
        response = client.request(method, f"{API}{path}", json=body, headers=as_("lhcb", SERVICE_ADMINISTRATOR))
        assert response.status_code == 503, (path, response.text)
        assert says in response.json()["detail"], path
        assert "DIRACX_DB_URL_MYPILOTDB" in response.json()["detail"]
        assert int(response.headers["Retry-After"]) > 0


def _schema(client: Any) -> dict[str, Any]:
    whole: dict[str, Any] = client.get("/api/openapi.json").json()
    whole["paths"] = {path: each for path, each in whole["paths"].items() if path.startswith(API)}
    return whole


@on_sqlite
def test_any_input_is_handled_by_every_route(app: Any, client: Any, as_: As) -> None:
    from fastapi.testclient import TestClient

    quiet = TestClient(app, raise_server_exceptions=False)
    quiet.portal = client.portal
    headers = as_("lhcb", SERVICE_ADMINISTRATOR) | {"content-type": "application/json"}
    responses = {address: quiet.get(address, headers=headers) for address in hostile_addresses(_schema(client))}
    for address, body in hostile_bodies(_schema(client), ce_name="ce"):
        responses[f"{address} {body}"] = quiet.post(address, content=body, headers=headers)
    broken = [what[:200] for what, response in responses.items() if response.status_code in (500, 503)]
    assert not broken, "\n".join(broken)


@on_sqlite
def test_every_parameter_and_body_of_every_route_about_pilots_is_bounded(client: Any) -> None:
    # Rules are an administrator's, and `gubbins.domain.rules` checks them.
    found = [place for place in unbounded_in(_schema(client)) if "body.rules." not in place]
    assert not found, "\n".join(found)
