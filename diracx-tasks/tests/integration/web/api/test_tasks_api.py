"""The task system in a DiracX application: access control and responses."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from diracx.tasks import operations as monitor
from diracx.tasks.operations.audit import read_audit
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from redis import Redis
from support.config_repository import ConfigRepository
from support.dashboard_world import HOSTILE, SECRET, World, small_world
from support.diracx_application import HOME, make_application, set_environment, token_maker
from support.waiting import eventually
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

READS = [
    *("summary", "queues", "queues/realtime:large", "running", "delayed", "workers", "stats", "history"),
    *("failures", "locks", "schedules", "groups", "configuration", "audit", "dead-letters", "dead-letters/1"),
    *("waiting-dead-letters", "configuration/settings"),
]
WRITES: dict[str, Any] = {
    "cancel": {"task_ids": ["0" * 32]},
    "queues/realtime:large/purge": None,
    "locks/release": {"key": "diracx:lock:mutex:nothing"},
    "schedules/pause": {"ids": ["test:None"]},
    "schedules/resume": {"ids": ["test:None"]},
    "schedules/run-now": {"schedule_id": "test:None"},
    "dead-letters/retry": {"ids": [1]},
    "dead-letters/discard": {"all": True},
}

Token = Callable[..., str]


@pytest.fixture
async def world(redis_url: str) -> AsyncIterator[World]:
    async with small_world(redis_url) as made:
        yield made


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, redis_url: str) -> Token:
    """Makes tokens that the application will accept; the environment of the application is that of this test."""
    repository = ConfigRepository(tmp_path / "config", vos=["lhcb"])
    set_environment(monkeypatch, tmp_path, redis_url, repository.url)
    return token_maker()


@pytest.fixture
async def client(token: Token, world: World, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[httpx.AsyncClient]:
    """A DiracX application with the dashboard of the small world."""
    from diracx.tasks.web.api import environment

    async def this() -> Any:
        return world.context

    monkeypatch.setattr(environment, "open_context", this)
    app = make_application()
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url=HOME) as made,
    ):
        yield made


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


async def test_a_token_that_has_expired_or_is_of_an_unknown_vo_is_refused(
    client: httpx.AsyncClient, token: Token
) -> None:
    expired, foreign = token("ServiceAdministrator", seconds=-60), token("ServiceAdministrator", vo="elsewhere")
    for refused, status in ((expired, 401), (foreign, 403)):
        for path in READS:
            assert (await client.get(f"/api/tasks/{path}", headers=bearer(refused))).status_code == status, path
        for path, body in WRITES.items():
            response = await client.post(f"/api/tasks/{path}", json=body, headers=bearer(refused))
            assert response.status_code == status, f"{path}: {response.text}"


async def test_an_unavailable_database_of_dead_letters_is_503(
    client: httpx.AsyncClient, token: Token, world: World, tmp_path: Path
) -> None:
    from diracx.tasks.plumbing.persistence import TaskDB

    (tmp_path / "another").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    world.context.task_db = TaskDB(f"sqlite+aiosqlite:///{tmp_path}/another")
    requested = [("GET", path, None) for path in READS if path.startswith("dead-letters")]
    requested += [("POST", path, body) for path, body in WRITES.items() if path.startswith("dead-letters")]
    async with world.context.task_db.engine_context():
        for method, path, body in requested:
            address, headers = f"/api/tasks/{path}", bearer(token("ServiceAdministrator"))
            response = await client.request(method, address, json=body, headers=headers)
            assert response.status_code == 503, (path, response.text)
            assert "is not an SQLite database" in response.json()["detail"]
            assert "DIRACX_DB_URL_TASKDB" in response.json()["detail"]


@pytest.mark.parametrize("role", ["Operator", "ServiceAdministrator"])
async def test_a_reader_of_one_vo_makes_the_server_search_no_more_delayed_tasks_than_an_administrator(
    client: httpx.AsyncClient, token: Token, redis_url: str, role: str
) -> None:
    """The task that is asked for is the last of 45,000."""
    ids, due = [f"{number:032x}" for number in range(45_000)], time.time() * 1000 + 36_000_000
    with Redis.from_url(redis_url) as redis:
        redis.flushall()
        redis.zadd(keys.DELAYED, {task: due + number for number, task in enumerate(ids)})
        redis.hset(keys.DELAYED_DATA, mapping=dict.fromkeys(ids[:-1], "diracx:tasks:normal:medium at_time 0\n"))
        redis.hset(keys.DELAYED_DATA, ids[-1], "diracx:tasks:normal:medium retry 0\n")
        redis.hset(keys.DELAYED_REASONS, mapping={"at_time": len(ids) - 1, "retry": 1})
    address, headers = "/api/tasks/delayed?reason=retry", bearer(token(role))
    found, pages, after = [], 1, ""
    page = (await client.get(address, headers=headers)).json()
    while (after := page["after"]) is not None:
        found, pages = [*found, *page["items"]], pages + 1
        page = (await client.get(address, params={"reason": "retry", "after": after}, headers=headers)).json()
    assert (found, pages) == ([], 3)  # 20,000 of 45,000 each


@pytest.mark.parametrize("role", ["Operator", "ServiceAdministrator"])
async def test_an_unavailable_broker_is_503_without_its_address(
    client: httpx.AsyncClient, token: Token, world: World, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    broker = RedisStreamBroker("redis://wilma:sesame@127.0.0.1:1")
    monkeypatch.setattr(world.context, "broker", broker)
    responses = [await client.get(f"/api/tasks/{path}", headers=bearer(token(role))) for path in READS]
    assert {response.status_code for response in responses} >= {503}
    assert "127.0.0.1" not in "".join(response.text for response in responses)
    await broker.shutdown()


async def test_an_invalid_cursor_is_not_found(client: httpx.AsyncClient, token: Token) -> None:
    for path in ("running", "delayed", "failures", "queues/normal:small", "dead-letters/waiting"):
        for after in ("x", "nan", "1-x", "99999999999999999999-1"):
            response = await client.get(
                f"/api/tasks/{path}", params={"after": after}, headers=bearer(token("Operator"))
            )
            reported = response.status_code, response.json()
            assert response.status_code == 404, f"{path} {after}: {reported}"


async def test_responses_match_the_schema_and_contain_no_secrets(client: httpx.AsyncClient, token: Token) -> None:
    from diracx.tasks.web.api.api import router
    from fastapi.routing import APIRoute
    from pydantic import TypeAdapter

    headers = bearer(token("ServiceAdministrator"))
    models = {route.path: route.response_model for route in router.routes if isinstance(route, APIRoute)}
    for path in READS:
        response = await client.get(f"/api/tasks/{path}", headers=headers)
        template = re.sub(r"^/(queues|dead-letters|groups)/.*", r"/\1/{}", f"/{path}")
        model = next(m for known, m in models.items() if re.sub(r"\{\w+\}", "{}", known) == template)
        TypeAdapter(model).validate_json(response.content)
        assert SECRET not in response.text
    dead_letter = (await client.get("/api/tasks/dead-letters/1", headers=headers)).json()
    assert dead_letter["arguments"]["password"] == "•••"
    assert HOSTILE in dead_letter["arguments"]["url"]


async def test_actions_by_http_are_done_and_audited(client: httpx.AsyncClient, token: Token, world: World) -> None:
    headers = bearer(token("ServiceAdministrator"))

    async def post(path: str, **body: Any) -> Any:
        response = await client.post(f"/api/tasks/{path}", json=body, headers=headers)
        assert response.status_code == 200, response.text
        return response.json()

    assert await post("dead-letters/discard", ids=[1]) == {"done": [1], "already": [], "refused": []}
    assert (await post("dead-letters/retry", all=True, task_name="Fail"))["done"] == [2, 3]
    assert await post("cancel", task_ids=["f" * 32, "0" * 32]) == {"f" * 32: "queued", "0" * 32: "unknown"}
    assert await post("schedules/pause", ids=["test:Tidy/lhcb"]) == {"changed": ["test:Tidy/lhcb"]}
    assert len((await post("schedules/run-now", schedule_id="test:Tidy/lhcb"))["task_id"]) == 32
    entries = await read_audit(world.system.broker.redis)
    assert {entry.who for entry in entries} == {"fred (lhcb:nobody)"}
    assert {entry.via for entry in entries} == {"api"}
    assert len(entries) == 5


async def test_a_server_that_refuses_tasks_is_an_error_503_of_the_application(
    client: httpx.AsyncClient, token: Token, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.refuse(monkeypatch)
    response = await client.post(
        "/api/tasks/dead-letters/retry", json={"ids": [1]}, headers=bearer(token("ServiceAdministrator"))
    )
    assert response.status_code == 503, response.text
    assert response.json()["detail"].startswith("cannot submit 1 dead letters again")


async def test_a_lock_is_found_by_its_key(client: httpx.AsyncClient, token: Token, world: World) -> None:
    [held] = [lock for task in (await monitor.running(world.system.broker.redis)).items for lock in task.locks]

    async def ask(key: str, *properties: str) -> httpx.Response:
        return await client.get("/api/tasks/locks/one", params={"key": key}, headers=bearer(token(*properties)))

    response = (await ask(held, "ServiceAdministrator")).json()
    assert (response["key"], response["held"], response["waiters"]) == (held, 1, 1)
    assert response["holders"][0]["task_name"] == "test:HoldSite"
    for none in ("lock:mutex:job:42", "diracx:tasks:alive"):
        assert (await ask(none, "ServiceAdministrator")).status_code == 404, none
    assert (await ask(held, "NormalUser")).status_code == 403


async def test_settings_are_explained_as_by_the_command_line(client: httpx.AsyncClient, token: Token) -> None:
    async def ask(**params: str) -> httpx.Response:
        path = "/api/tasks/configuration/settings"
        return await client.get(path, params=params, headers=bearer(token("Operator")))

    everything = (await ask()).json()
    assert {each["task"] for each in everything["tasks"]} >= {"test:Hold", "test:Tidy"}
    [one] = (await ask(task_name="Fail", vo="lhcb")).json()["tasks"]
    assert (one["task"], one["vo"]) == ("test:Fail", "lhcb")
    assert one["settings"]["priority"] == {"value": "normal", "from": "code", "path": None, "line": None}
    assert (await ask(task_name="Nothing")).status_code == 404
    assert (await ask(vo="nowhere")).status_code == 404


async def test_the_schema_of_the_application_has_every_route(client: httpx.AsyncClient) -> None:
    schema = (await client.get("/api/openapi.json")).json()
    for path in ("/api/tasks/locks/one", "/api/tasks/configuration/settings", "/api/tasks/audit"):
        assert path in schema["paths"]
    for path in ("/api/tasks/summary", "/api/tasks/dead-letters/{key}", "/api/tasks/queues/{queue}/purge"):
        assert path in schema["paths"]
    assert not [path for path in schema["paths"] if "dashboard" in path]
    operations = [each["operationId"] for methods in schema["paths"].values() for each in methods.values()]
    assert len(operations) == len(set(operations))
    pages = [schema["components"]["schemas"][f"Page_{item}_"] for item in ("QueuedTask", "Failure", "Lock")]
    assert all("next page" in page["properties"]["after"]["description"] for page in pages)


async def test_a_link_with_a_diracx_token_does_not_sign_in(client: httpx.AsyncClient, token: Token) -> None:
    below = "/api/tasks/dashboard"
    response = await client.get(f"{below}/sign-in", params={"token": token("ServiceAdministrator")})
    assert response.status_code == 200
    assert "set-cookie" not in response.headers
    assert (await client.get(f"{below}/queues")).status_code == 303


async def test_the_dashboard_of_the_application_takes_diracx_tokens(
    client: httpx.AsyncClient, token: Token
) -> None:
    below = "/api/tasks/dashboard"
    response = await client.get(f"{below}/queues")
    assert response.headers["location"] == f"{below}/sign-in?next=%2Fqueues"
    for refused in ("invalid", token("NormalUser"), token("Operator", seconds=-60), token("Operator", vo="x")):
        response = await client.post(f"{below}/sign-in", data={"credential": refused})
        assert response.status_code == 403
    response = await client.post(f"{below}/sign-in", data={"credential": token("Operator"), "next": "/queues"})
    assert response.headers["location"] == f"{below}/queues"
    assert f"Path={below}" in response.headers["set-cookie"]
    page = await client.get(f"{below}/queues")
    assert page.status_code == 200
    assert "read-only" in page.text
    assert "read and write" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for link in re.findall(r'(?:href|src|action|hx-post|data-live)="([^"]+)"', page.text):
        assert link.startswith((below, "#")), link
    [style] = re.findall(r'href="([^"]*dashboard\.css[^"]*)"', page.text)
    assert (await client.get(style)).status_code == 200
    form = re.search(r'name="form_token" value="(\w+)"', page.text)
    assert form
    response = await client.post(
        f"{below}/queues/purge", data={"queue": "realtime:large", "confirmed": "yes", "form_token": form[1]}
    )
    assert response.status_code == 403


def test_the_dashboard_of_an_application_is_closed_with_its_event_loop(
    redis_url: str, token: Token, caplog: pytest.LogCaptureFixture
) -> None:
    async def read() -> None:
        transport = httpx.ASGITransport(make_application())
        async with httpx.AsyncClient(transport=transport, base_url=HOME) as browser:
            credential = {"credential": token("Operator")}
            await browser.post("/api/tasks/dashboard/sign-in", data=credential)
            assert (await browser.get("/api/tasks/dashboard/queues")).status_code == 200

    with Redis.from_url(redis_url) as redis:
        before = {each["id"] for each in redis.client_list()}
        for _ in range(2):
            asyncio.run(read())
        eventually(lambda: before.issuperset(each["id"] for each in redis.client_list()))
    assert not [record.getMessage() for record in caplog.records if record.name == "asyncio"]


async def test_cookies_are_secure_if_a_trusted_proxy_reports_tls(client: httpx.AsyncClient, token: Token) -> None:
    transport = client._transport
    assert isinstance(transport, httpx.ASGITransport)
    for trusted, scheme, secure in (
        ("127.0.0.1", "https", True),
        ("127.0.0.1", "http", False),
        ("192.0.2.1", "https", False),  # a header of an untrusted client
    ):
        # As `uvicorn --forwarded-allow-ips` makes it.
        behind = ProxyHeadersMiddleware(transport.app, trusted_hosts=trusted)  # type: ignore[arg-type]
        proxy = httpx.ASGITransport(behind, client=("127.0.0.1", 5))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=proxy, base_url=HOME) as browser:
            response = await browser.post(
                "/api/tasks/dashboard/sign-in",
                data={"credential": token("Operator")},
                headers={"X-Forwarded-Proto": scheme},
            )
        assert response.status_code == 303
        assert ("; Secure" in response.headers["set-cookie"]) is secure, (trusted, scheme)


async def test_without_jinja2_the_dashboard_names_the_missing_package(
    client: httpx.AsyncClient, token: Token, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("app", "rendering"):
        monkeypatch.delitem(sys.modules, f"diracx.tasks.web.dashboard.{name}")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    response = await client.get("/api/tasks/dashboard/")
    assert response.status_code == 503
    assert "pip install 'diracx-tasks[dashboard]'" in response.json()["detail"]
    response = await client.get("/api/tasks/queues", headers=bearer(token("Operator")))
    assert response.status_code == 200
