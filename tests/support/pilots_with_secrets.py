"""The real DiracX application, and pilots with secrets and its URL."""

from __future__ import annotations

__all__ = ["API", "VOS", "World", "secret_of"]

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from gubbins.ces import PilotAtCE
from gubbins.db.sql import MyPilotDB
from gubbins.logic import my_pilots as logic

API = "/api/my_pilots"


VOS = ("lhcb", "dteam")


@dataclass
class World:
    """The application, and the pilots given to the compute element `ce`."""

    app: Any
    db: MyPilotDB
    path: Path
    client: httpx.AsyncClient
    at_ce: list[PilotAtCE]

    async def submit(self, vo: str = "lhcb", **how: Any) -> tuple[int, PilotAtCE]:
        pilot_id = await logic.submit_pilot(self.db, "ce", vo, **how)
        return pilot_id, self.at_ce[-1]

    async def exchange(self, pilot: PilotAtCE, **other: Any) -> httpx.Response:
        body = {"stamp": pilot.stamp, "secret": secret_of(pilot)} | other
        return await self.client.post(f"{API}/token", json=body)

    async def refresh(self, pilot: PilotAtCE, token: str) -> httpx.Response:
        return await self.client.post(f"{API}/token", json={"stamp": pilot.stamp, "refresh_token": token})

    async def token(self, pilot: PilotAtCE) -> str:
        response = await self.exchange(pilot)
        assert response.status_code == 200, response.text
        return str(response.json()["access_token"])

    async def report(self, token: str, **said: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}"}
        return await self.client.post(f"{API}/report", json=said, headers=headers)

    async def running(self, **said: Any) -> tuple[int, str]:
        """A pilot that has reported: its id, and its token."""
        pilot_id, pilot = await self.submit()
        token = await self.token(pilot)
        assert (await self.report(token, **said)).status_code == 200
        return pilot_id, token


def secret_of(pilot: PilotAtCE) -> str:
    assert pilot.identity is not None
    return pilot.identity.secret
