"""Liveness and readiness probes of the dashboard, without token and for any host name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TYPE_CHECKING

from starlette.responses import PlainTextResponse, Response

from ..auth.middleware import path_below

if TYPE_CHECKING:
    from starlette.types import Scope

_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


async def probe(scope: Scope, readiness: Callable[[], Awaitable[tuple[bool, list[str]]]]) -> Response | None:
    """Respond to `/healthz` and `/readyz`; return None for other paths.

    Args:
        readiness: returns whether the dashboard is ready, and lines to add to the response.
    """
    path = path_below(scope)
    if path not in ("/healthz", "/readyz"):
        return None
    if scope["method"] not in ("GET", "HEAD"):
        return PlainTextResponse("only GET and HEAD\n", HTTPStatus.METHOD_NOT_ALLOWED, _HEADERS)
    if path == "/healthz":
        return PlainTextResponse("ok\n", HTTPStatus.OK, _HEADERS)
    ready, lines = await readiness()
    text = "\n".join(["ok" if ready else "not ready", *lines, ""])
    return PlainTextResponse(text, HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE, _HEADERS)
