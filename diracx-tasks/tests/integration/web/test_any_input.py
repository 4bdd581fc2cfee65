"""Bounds of all HTTP input, and any input to routes and pages."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from diracx.tasks.web.auth.backends import Principal, Role, TokenBackend
from diracx.tasks.web.dashboard.pages import ACTIONS, PAGES
from diracx.tasks.web.sse import StreamSettings
from support.config_repository import ConfigRepository
from support.dashboard_world import READER, WRITER, World, small_world
from support.diracx_application import HOME, make_application, set_environment, token_maker
from support.hostile_requests import HOSTILE, hostile_addresses, hostile_bodies, quoted, unbounded_in
from support.waiting import until


@pytest.fixture
async def world(redis_url: str) -> AsyncIterator[World]:
    async with small_world(redis_url) as made:
        yield made


@pytest.fixture
async def client(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, redis_url: str
) -> AsyncIterator[httpx.AsyncClient]:
    """An administrator of a DiracX application with the dashboard of the small world."""
    from diracx.tasks.web.api import environment

    repository = ConfigRepository(tmp_path / "config", vos=["lhcb"])
    set_environment(monkeypatch, tmp_path, redis_url, repository.url)

    async def this() -> Any:
        return world.context

    monkeypatch.setattr(environment, "open_context", this)
    app = make_application()
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    headers = {"Authorization": f"Bearer {token_maker()('ServiceAdministrator')}"}
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url=HOME, headers=headers) as made,
    ):
        yield made


async def schema_of(client: httpx.AsyncClient) -> dict[str, Any]:
    found: dict[str, Any] = (await client.get("/api/openapi.json")).json()
    found["paths"] = {path: each for path, each in found["paths"].items() if path.startswith("/api/tasks/")}
    assert len(found["paths"]) > 20
    return found


async def test_every_parameter_and_body_of_every_route_is_bounded(client: httpx.AsyncClient) -> None:
    found = list(unbounded_in(await schema_of(client)))
    assert not found, "\n".join(found)


async def test_any_parameter_is_handled_by_every_route(client: httpx.AsyncClient) -> None:
    broken = []
    for address in hostile_addresses(await schema_of(client), queue="normal:small"):
        response = await client.get(address)
        if response.status_code >= 500:
            broken.append(f"{response.status_code} {address[:200]}: {response.text[:200]}")
    assert not broken, "\n".join(broken)


async def test_any_body_is_handled_by_every_route(client: httpx.AsyncClient) -> None:
    broken = []
    for address, body in hostile_bodies(await schema_of(client), queue="normal:small"):
        response = await client.post(address, content=body, headers={"content-type": "application/json"})
        if response.status_code >= 500:
            broken.append(f"{response.status_code} {address} {body[:100]}: {response.text[:200]}")
    assert not broken, "\n".join(broken)


async def test_the_address_of_a_refused_request_is_escaped_in_the_log(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "diracx.tasks.web.api.responses")
    response = await client.get("/api/tasks/queues/" + quoted("x" * 41 + "\x1b[2J\u202e"))
    assert response.status_code == 422
    assert "x\\x1b[2J\\u202e': 422" in caplog.text
    assert not {"\x1b", "\u202e"} & set(caplog.text)


# --- the dashboard ----------------------------------------------------------------------------------------------


@asynccontextmanager
async def signed_in(world: World, token: str = WRITER) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(world.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8790") as made:
        assert (await made.post("/sign-in", data={"credential": token})).status_code == 303
        yield made


async def test_any_address_and_form_is_handled_by_every_page(world: World) -> None:
    broken = []
    async with signed_in(world) as client:
        form = re.search(r'name="form_token" value="(\w+)"', (await client.get("/queues")).text)
        assert form
        for page in PAGES:
            for value in HOSTILE:
                addresses = [re.sub(r"\{\w+\}", quoted(value) or "%20", page.path)]
                plain = re.sub(r"\{\w+\}", "normal:small", page.path)
                addresses += [
                    f"{plain}?{name}={quoted(value)}" for name in ("after", "vo", "task", "key", "reason")
                ]
                for address in addresses:
                    response = await client.get(address)
                    if response.status_code >= 500:
                        broken.append(f"{response.status_code} {address[:200]}")
        for action in ACTIONS:
            for value in HOSTILE:
                for confirmed in ("", "yes"):
                    names = ("task", "queue", "schedule", "key", "dead_letter", "next", "scope", "since", "owner")
                    fields = {"form_token": form[1], "confirmed": confirmed, **dict.fromkeys(names, value)}
                    body = "&".join(f"{name}={quoted(text)}" for name, text in fields.items())
                    headers = {"content-type": "application/x-www-form-urlencoded"}
                    response = await client.post(action.path, content=body, headers=headers)
                    if response.status_code >= 500:
                        broken.append(f"{response.status_code} POST {action.path} {value[:50]!r}")
    assert not broken, "\n".join(broken)


async def test_long_addresses_and_forms_are_refused_before_they_are_kept(world: World) -> None:
    transport = httpx.ASGITransport(world.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8790") as anonymous:
        assert (await anonymous.get("/sign-in?next=/" + "x" * 10_000)).status_code == 414
        assert (await anonymous.post("/sign-in", content=b"x=" + b"x" * 40_000)).status_code == 413
        assert (await anonymous.get("/sign-in?next=%00")).status_code == 400
    async with signed_in(world) as client:
        for body, status in ((b"task=" + b"x" * 10_000, 413), (b"task=%00", 400), (b"a=1&" * 3_000, 400)):
            assert (await client.post("/tasks/cancel", content=body)).status_code == status


async def test_the_oldest_session_of_a_principal_ends_at_the_limit_and_none_of_another() -> None:
    request: Any = None
    backend = TokenBackend(
        {WRITER: Principal("wilma", Role.WRITE, None), READER: Principal("rita", Role.READ, None)},
        "ask",
        max_sessions=3,
    )
    kept = await backend.sign_in(request, WRITER)
    readers = [await backend.sign_in(request, READER) for _ in range(20)]
    assert kept is not None
    assert await backend.principal(request, kept) is not None
    alive = [secret for secret in readers if secret and await backend.principal(request, secret)]
    assert alive == readers[-3:]


async def test_live_pages_per_user_are_limited_and_closing_one_frees_a_place(redis_url: str) -> None:
    async with (
        small_world(redis_url, stream=StreamSettings(max_streams=2)) as world,
        signed_in(world) as writer,
        signed_in(world, READER) as reader,
    ):

        def follow(client: httpx.AsyncClient) -> asyncio.Task[httpx.Response]:
            return asyncio.create_task(client.get("/live/queues"))

        streams: Callable[[], int] = lambda: world.app.streams.open["wilma"]  # noqa: E731
        open_ = [follow(writer), follow(writer)]
        async with asyncio.timeout(20):
            await until(lambda: streams() >= 2)
            assert (await writer.get("/live/queues")).status_code == 429
            other = follow(reader)
            await until(lambda: world.app.streams.open["rita"] >= 1)
            open_[0].cancel()
            await until(lambda: streams() != 2)
            again = follow(writer)
            await until(lambda: streams() >= 2)
        world.app.end_streams()
        for task in (open_[1], other, again):
            assert (await task).status_code == 200
    assert not +world.app.streams.open
