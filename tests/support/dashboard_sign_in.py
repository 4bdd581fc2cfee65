"""A DiracX application with sign-in at an identity provider, for tests of the dashboard."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from diracx.tasks.plumbing.broker import RedisStreamBroker
from diracx.tasks.plumbing.config.reader import ConfigReader
from diracx.tasks.plumbing.registry import TaskRegistry
from diracx.tasks.web.context import AppContext

from support.config_repository import ConfigRepository
from support.diracx_application import HOME, make_application, set_environment
from support.sites.identity_provider import CLIENT_ID, IdentityProvider

BELOW = "/api/tasks/dashboard"
CALLBACK = f"{BELOW}/sign-in/callback"
SETTING = "DIRACX_SERVICE_AUTH_ALLOWED_REDIRECTS"
SUBJECT = "0c7f-fred"


def registry(provider: IdentityProvider) -> dict[str, Any]:
    """Two VOs of that provider; in lhcb its user is an operator, in gridpp an administrator."""

    def vo(operators: list[str], admins: list[str]) -> dict[str, Any]:
        groups = {"users": ("NormalUser", [SUBJECT]), "operators": ("Operator", operators)}
        groups["admins"] = ("ServiceAdministrator", admins)
        return {
            "IdP": {"URL": provider.url, "ClientID": CLIENT_ID},
            "DefaultGroup": "users",
            "Users": {SUBJECT: {"PreferedUsername": "fred"}},
            "Groups": {name: {"Properties": [one], "Users": users} for name, (one, users) in groups.items()},
        }

    return {"lhcb": vo([SUBJECT], []), "gridpp": vo([], [SUBJECT])}


@asynccontextmanager
async def application(
    monkeypatch: pytest.MonkeyPatch, directory: Path, redis_url: str, redirects: list[str]
) -> AsyncIterator[Any]:
    """The application and its provider, both at work."""
    from diracx.db.sql import AuthDB
    from diracx.tasks.web.api import environment

    broker = RedisStreamBroker(redis_url)

    async def this() -> AppContext:
        return AppContext(broker, TaskRegistry.of({}), ConfigReader())

    monkeypatch.setattr(environment, "open_context", this)
    with IdentityProvider(SUBJECT).running() as provider:
        repository = ConfigRepository(directory / "config")
        config = {"DIRAC": {}, "Operations": {}, "Registry": registry(provider)}
        repository.commit_text(json.dumps(config))
        set_environment(monkeypatch, directory, redis_url, repository.url)
        url = f"sqlite+aiosqlite:///{directory}/auth.db"
        monkeypatch.setenv("DIRACX_SERVICE_AUTH_ENABLED", "true")
        monkeypatch.setenv("DIRACX_DB_URL_AUTHDB", url)
        monkeypatch.setenv(SETTING, json.dumps(redirects))
        database = AuthDB(url)
        async with database.engine_context(), database.engine.begin() as connection:
            await connection.run_sync(database.metadata.create_all)
        app = make_application()
        async with app.router.lifespan_context(app):
            yield app
        await broker.shutdown()


class Browser:
    """Follows redirects like a browser, and records all addresses and responses."""

    def __init__(self, app: Any, home: str = HOME) -> None:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url=home, event_hooks={"response": [self._see]})
        self.seen: list[httpx.Response] = []

    async def __aenter__(self) -> Browser:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.aclose()

    async def _see(self, response: httpx.Response) -> None:
        self.seen.append(response)

    async def get(self, path: str) -> httpx.Response:
        """A page of the dashboard."""
        return await self.client.get(BELOW + path)

    async def start(self, choice: str, target: str = "/queues") -> httpx.Response:
        """Choose a VO and group, and press the button."""
        return await self.client.post(f"{BELOW}/sign-in/start", data={"choice": choice, "next": target})

    async def consent(self, started: httpx.Response) -> str:
        """Go where that page leads to, and consent: the address that the browser is sent back to."""
        response = await self.client.get(onward(started))
        assert response.status_code == 307, response.text
        async with httpx.AsyncClient(event_hooks={"response": [self._see]}) as elsewhere:
            page = await elsewhere.get(response.headers["location"])
            consent = re.search(r'name="asked" value="([^"]+)"', page.text)
            assert consent, page.text
            given = await elsewhere.post(
                f"{page.url.scheme}://{page.url.netloc.decode()}/consent", data={"asked": consent[1]}
            )
        back = await self.client.get(given.headers["location"])
        assert back.status_code == 307, back.text
        return str(back.headers["location"])

    async def sign_in(self, choice: str, target: str = "/queues") -> httpx.Response:
        """All of it: the last page, which leads to the dashboard."""
        return await self.client.get(await self.consent(await self.start(choice, target)))


def onward(page: httpx.Response) -> str:
    """Return the address to which a page redirects."""
    found = re.search(r'http-equiv="refresh" content="0; url=([^"]+)"', page.text)
    assert found, page.text
    return found[1].replace("&amp;", "&")
