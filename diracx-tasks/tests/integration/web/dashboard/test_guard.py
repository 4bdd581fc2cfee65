"""Authentication of the dashboard: requests without a valid session are refused."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from diracx.tasks.operations.audit import read_audit
from diracx.tasks.plumbing.broker import RedisStreamBroker
from diracx.tasks.plumbing.config.reader import ConfigReader
from diracx.tasks.plumbing.registry import TaskRegistry
from diracx.tasks.web.auth.backends import Principal, Role, TokenBackend
from diracx.tasks.web.context import AppContext
from diracx.tasks.web.dashboard import DashboardApp
from diracx.tasks.web.dashboard.page import Action, Extension, Form, Operator, Page, Question
from diracx.tasks.web.sse import StreamSettings
from redis.asyncio import Redis
from starlette.requests import Request

HOME = "http://localhost:8790"
WRITER, READER = "the-token-of-the-writer", "the-token-of-the-reader"


async def _nothing(request: Request, context: AppContext) -> dict[str, Any]:
    return {"text": "a page of an extension"}


async def _ask(form: Form, context: AppContext) -> Question:
    return Question(f"Paint {form.one('thing')}?", "It will be red.", "Paint it", details=form.many("thing"))


async def _do(form: Form, operator: Operator) -> str:
    async def paint() -> str:
        return "painted"

    await operator.perform("paint", form.one("thing"), paint)
    return f"{form.one('thing')} is red now."


EXTENSION = Extension(
    pages=[Page("/plain", "error", "Plain", _nothing, live=False)], actions=[Action("/paint", _ask, _do)]
)


@pytest.fixture
async def app(redis_url: str) -> AsyncIterator[Any]:
    broker = RedisStreamBroker(redis_url)

    async def context() -> AppContext:
        return AppContext(broker, TaskRegistry.of({}), ConfigReader())

    tokens = {
        WRITER: Principal("wilma", Role.WRITE, None),
        READER: Principal("rita", Role.READ, None),
    }
    stream = StreamSettings(max_seconds=0.2, poll_seconds=0.3)
    backend = TokenBackend(tokens, "ask")
    made = DashboardApp(context, backend, hosts={"localhost"}, extensions=[EXTENSION], stream=stream)
    yield made
    await made.aclose()
    await broker.shutdown()


def browser(app: Any, base: str = HOME) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url=base)


@asynccontextmanager
async def signed_in(app: Any, token: str = WRITER) -> AsyncIterator[httpx.AsyncClient]:
    async with browser(app) as client:
        response = await client.post("/sign-in", data={"credential": token})
        assert response.status_code == 303
        yield client


async def form_token(client: httpx.AsyncClient) -> str:
    found = re.search(r'name="form_token" value="([0-9a-f]{64})"', (await client.get("/plain")).text)
    assert found
    return found[1]


@pytest.mark.parametrize("path", ["/plain", "/", "/live/", "/queues/normal:small", "/nothing", "/dead-letters/1"])
async def test_without_a_session_every_page_leads_to_the_sign_in(app: Any, path: str) -> None:
    async with browser(app) as client:
        response = await client.get(path)
    assert response.status_code == 303
    assert response.headers["location"].startswith("/sign-in?next=")


@pytest.mark.parametrize("path", ["/paint", "/queues/purge", "/tasks/cancel", "/sign-out", "/nothing"])
async def test_without_a_session_nothing_can_be_done(app: Any, path: str) -> None:
    async with browser(app) as client:
        response = await client.post(path, data={"confirmed": "yes"})
    assert response.status_code == 401


async def test_a_wrong_token_gives_no_access_and_is_not_shown(app: Any) -> None:
    async with browser(app) as client:
        response = await client.post("/sign-in", data={"credential": "<script>wrong"})
        assert response.status_code == 403
        assert "<script>wrong" not in response.text
        assert (await client.get("/plain")).status_code == 303


async def test_the_printed_link_signs_in_and_leads_to_an_address_without_the_token(app: Any) -> None:
    async with browser(app) as client:
        response = await client.get(f"/sign-in?token={WRITER}&next=/plain")
        assert response.headers["location"] == "/plain"
        cookie = response.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert WRITER not in cookie
        assert (await client.get("/plain")).status_code == 200


async def test_the_sign_in_form_does_not_redirect_to_other_sites(app: Any) -> None:
    async with browser(app) as client:
        for target in ("https://evil.example/", "//evil.example/", "/\\evil.example", "\t//evil.example"):
            response = await client.post("/sign-in", data={"credential": WRITER, "next": target})
            assert response.headers["location"] == "/"


async def test_every_response_has_a_strict_policy_and_no_page_has_a_script_or_style_of_its_own(app: Any) -> None:
    async with signed_in(app) as client:
        for path in ("/plain", "/nothing", "/static/dashboard.js", "/sign-in"):
            response = await client.get(path)
            policy = response.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.headers["x-frame-options"] == "DENY"
            if response.headers["content-type"].startswith("text/html"):
                assert response.headers["cache-control"] == "no-store"
                assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=", response.text)


async def test_a_form_of_another_site_or_session_does_nothing(app: Any, redis: Redis) -> None:
    async with signed_in(app) as client, signed_in(app, READER) as other:
        token = await form_token(client)
        good = {"confirmed": "yes", "thing": "x", "form_token": token}
        for headers in (
            {"origin": "https://evil.example"},
            {"origin": "http://["},
            {"origin": "null"},
            {"sec-fetch-site": "cross-site"},
            {"sec-fetch-site": "same-site", "origin": "http://localhost:3000"},
        ):
            assert (await client.post("/paint", data=good, headers=headers)).status_code == 403
        for wrong in ("", "x" * 64, await form_token(other), "é"):
            assert (await client.post("/paint", data=good | {"form_token": wrong})).status_code == 403
        assert await read_audit(redis) == []
        headers = {"origin": HOME, "sec-fetch-site": "same-origin"}
        assert (await client.post("/paint", data=good, headers=headers)).status_code == 303


async def test_another_site_can_link_to_a_page_but_fetch_nothing(app: Any) -> None:
    async with signed_in(app) as client:
        for site in ("same-site", "cross-site"):
            elsewhere = {"sec-fetch-site": site, "origin": "http://localhost:3000"}
            for mode, status in (("cors", 403), ("no-cors", 403), ("navigate", 200)):
                headers = elsewhere | {"sec-fetch-mode": mode}
                assert (await client.get("/plain", headers=headers)).status_code == status
        headers = {"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}
        assert (await client.get("/plain", headers=headers)).status_code == 200


async def test_a_live_page_is_notified_of_its_expired_session(app: Any) -> None:
    async with browser(app) as client:
        response = await client.get("/live/queues", headers={"accept": "text/event-stream"})
    assert response.text == "event: gone\ndata: your session has expired\n\n"


async def test_a_reader_cannot_act(app: Any, redis: Redis) -> None:
    async with signed_in(app, READER) as client:
        data = {"confirmed": "yes", "thing": "x", "form_token": await form_token(client)}
        response = await client.post("/paint", data=data)
        assert response.status_code == 403
        assert "your role is `read`" in response.text
    assert await read_audit(redis) == []


async def test_an_action_is_confirmed_performed_reported_and_audited(app: Any, redis: Redis) -> None:
    async with signed_in(app) as client:
        data = {"thing": "<b>door</b>", "form_token": await form_token(client), "next": "/plain"}
        question = await client.post("/paint", data=data)
        assert question.status_code == 200
        assert "Paint &lt;b&gt;door&lt;/b&gt;?" in question.text
        assert "<b>door" not in question.text
        assert await read_audit(redis) == []
        done = await client.post("/paint", data=data | {"confirmed": "yes"})
        assert done.headers["location"] == "/plain"
        page = await client.get("/plain")
        assert "&lt;b&gt;door&lt;/b&gt; is red now." in page.text
        assert "is red now." not in (await client.get("/plain")).text
    [entry] = await read_audit(redis)
    assert (entry.who, entry.via, entry.action, entry.target) == ("wilma", "dashboard", "paint", "<b>door</b>")
    assert (entry.ok, entry.outcome) == (True, "painted")


@pytest.mark.parametrize("flash", ["[" * 3000, "[]", "{", '{"ok": 1}', '{"ok": 1, "text": "\\ud800"}'])
async def test_a_flash_message_of_another_program_of_the_host_breaks_no_page(app: Any, flash: str) -> None:
    async with signed_in(app) as client:
        client.cookies.set("tasks-dashboard-flash", quote(flash))
        assert (await client.get("/plain")).status_code == 200


@pytest.mark.parametrize(("path", "allowed"), [("/plain", "GET, HEAD, POST"), ("/healthz", "GET, HEAD")])
async def test_other_methods_are_refused_with_those_that_are_allowed(app: Any, path: str, allowed: str) -> None:
    async with browser(app) as client:
        response = await client.put(path)
    assert (response.status_code, response.headers["allow"]) == (405, allowed)


async def test_a_foreign_host_name_is_refused(app: Any) -> None:
    async with browser(app, "http://rebound.example:8790") as client:
        assert (await client.get("/sign-in")).status_code == 421
    async with browser(app) as client:
        assert (await client.get("/sign-in", headers={"host": "[x"})).status_code in (400, 421)


async def test_an_ended_session_is_invalid(app: Any) -> None:
    async with signed_in(app) as client:
        token = await form_token(client)
        kept = "; ".join(f"{name}={value}" for name, value in client.cookies.items())
        assert (await client.post("/sign-out", data={"form_token": token})).status_code == 303
        assert (await client.get("/plain", headers={"cookie": kept})).status_code == 303


async def test_a_huge_form_is_not_read(app: Any) -> None:
    async with signed_in(app) as client:
        assert (await client.post("/paint", content=b"x" * 1_100_000)).status_code == 413


def every_route(app: Any) -> list[tuple[str, str]]:
    """Method and path of all that the dashboard has, with something in the place of each placeholder."""
    found = [("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/nothing"), ("GET", "/static/dashboard.js")]
    for route in app._app._app.routes:
        path = re.sub(r"\{\w+\}", "normal:small", route.path)
        found += [(method, path) for method in getattr(route, "methods", None) or ()]
    assert ("POST", "/paint") in found
    assert ("GET", "/live/queues/normal:small") in found
    return found


async def test_every_route_sends_the_security_headers_to_every_client(
    app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with browser(app) as anonymous, signed_in(app) as wilma:
        for client in (anonymous, wilma):
            for method, path in every_route(app):
                if path == "/sign-out":
                    continue
                response = await client.request(method, path)
                assert response.headers["x-content-type-options"] == "nosniff", path
                if path in ("/healthz", "/readyz"):
                    continue
                assert "default-src 'none'" in response.headers["content-security-policy"], path
                assert "frame-ancestors 'none'" in response.headers["content-security-policy"], path
                for name in ("x-frame-options", "referrer-policy", "cross-origin-opener-policy"):
                    assert name in response.headers, f"{path} {name}"
                if not path.startswith("/static"):
                    assert response.headers["cache-control"] == "no-store", path
                for cookie in response.headers.get_list("set-cookie"):
                    assert {"httponly", "samesite=strict"} <= set(cookie.lower().split("; ")), path


async def test_every_action_requires_a_form_of_this_session_and_site(app: Any, redis: Redis) -> None:
    async with signed_in(app) as wilma:
        token = await form_token(wilma)
        for method, path in every_route(app):
            if method != "POST" or path == "/sign-in":
                continue
            for data, headers in (
                ({}, {}),
                ({"form_token": "0" * 64}, {}),
                ({"form_token": token}, {"origin": "https://evil.example"}),
                ({"form_token": token}, {"sec-fetch-site": "cross-site"}),
                ({"form_token": token}, {"sec-fetch-site": "same-site"}),
            ):
                response = await wilma.post(path, data={**data, "confirmed": "yes"}, headers=headers)
                assert response.status_code == 403, f"{path} {data} {headers}"
    assert await read_audit(redis) == []
