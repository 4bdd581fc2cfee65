"""Fixtures: the real DiracX application, and pilots with its URL."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.diracx_application import HOME, set_environment
from support.pilots_with_secrets import API, VOS, World

from gubbins.ces import PilotAtCE, SubmitOutcome
from gubbins.db.sql import MyPilotDB


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
    from support.fixed_config import config_url

    at_ce: list[PilotAtCE] = []

    async def submit(self: Any, pilots: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome]:
        at_ce.extend(pilots)
        return {pilot.stamp: SubmitOutcome(f"job.{pilot.stamp}") for pilot in pilots}

    monkeypatch.setattr(scripted, "submit", submit)
    await sqlite_db.add_ce("ce", 100, 1.0, backend="scripted")
    set_environment(monkeypatch, tmp_path, redis_url, config_url(VOS))
    monkeypatch.setenv("DIRACX_DB_URL_MYPILOTDB", sqlite_url)
    monkeypatch.setenv("DIRACX_SERVICE_MY_PILOTS_ENABLED", "true")
    monkeypatch.setenv("GUBBINS_PILOT_API_URL", f"{HOME}{API}/")
    app = create_app()
    app.dependency_overrides[ConfigSource.create].__self__.read()  # else the first response is 503
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url=HOME) as client,
    ):
        yield World(app, sqlite_db, Path(sqlite_url.partition("///")[2]), client, at_ce)
