"""The tables of docs/reference/who-may-see-what.md, and clients of their roles."""

from __future__ import annotations

__all__ = ["BELOW", "REFUSED", "Row", "client_with", "rows"]

import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from support.diracx_application import HOME
from support.paths import ROOT

_PAGE = ROOT / "docs" / "reference" / "who-may-see-what.md"
REFUSED = "\u2013"
#: The dashboard in the DiracX application.
BELOW = "/api/tasks/dashboard"


@dataclass(frozen=True)
class Row:
    """A route, and the access of each role."""

    method: str
    path: str
    cells: dict[str, str]

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


def rows(heading: str, roles: Iterable[str]) -> list[Row]:
    """The rows of the table below this heading."""
    text = _PAGE.read_text().partition(f"### {heading}")[2].partition("\n### ")[0]
    found = []
    for line in re.findall(r"^\| `(?:GET|POST|DELETE) .*$", text, re.MULTILINE):
        route, _, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        method, path = route.strip("`").split()
        found.append(Row(method, path, dict(zip(roles, cells, strict=True))))
    return found


@asynccontextmanager
async def client_with(app: Any, token: str | None) -> AsyncIterator[httpx.AsyncClient]:
    """A client with this token for routes, and signed in to the dashboard as far as it may be; None: anonymous."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url=HOME) as client:
        if token is not None:
            client.headers["Authorization"] = f"Bearer {token}"
            await client.post(f"{BELOW}/sign-in", data={"credential": token})
        yield client
