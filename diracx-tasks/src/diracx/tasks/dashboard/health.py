"""Whether the dashboard lives and is ready, for probes: those have no token, and call by any name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TYPE_CHECKING

from starlette.responses import PlainTextResponse, Response

from .guard import path_below

if TYPE_CHECKING:
    from starlette.types import Scope

_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


async def probe(scope: Scope, is_ready: Callable[[], Awaitable[bool]]) -> Response | None:
    """The answer to `/healthz` and `/readyz`; None to all else."""
    path = path_below(scope)
    if path not in ("/healthz", "/readyz"):
        return None
    if scope["method"] not in ("GET", "HEAD"):
        return PlainTextResponse("only GET and HEAD\n", HTTPStatus.METHOD_NOT_ALLOWED, _HEADERS)
    if path == "/readyz" and not await is_ready():
        return PlainTextResponse("not ready\n", HTTPStatus.SERVICE_UNAVAILABLE, _HEADERS)
    return PlainTextResponse("ok\n", HTTPStatus.OK, _HEADERS)
