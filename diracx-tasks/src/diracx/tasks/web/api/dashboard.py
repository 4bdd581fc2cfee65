"""Mounts the dashboard at `/api/tasks/dashboard/`, with the tokens and the access policy of DiracX."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any

from diracx.core.settings import AuthSettings
from diracx.routers.access_policies import BaseAccessPolicy, open_access
from diracx.routers.fastapi_classes import DiracxRouter
from fastapi import Depends, HTTPException, Request, Response

from ...plumbing._util.tasks import at_end_of_loop
from ..auth.code_flow import CodeFlow
from ..auth.diracx import POLICY, DiracxAuthContext, DiracxBackend
from ..auth.policies import ConfigReader
from ..sse import StreamSettings
from .environment import context_from_environment

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from ..dashboard.app import DashboardApp

_ROOT_PATH = "/api/tasks/dashboard"

# It has its own sign-in, as browsers send no `Authorization` header, and is not part of the API for programs.
router = DiracxRouter(require_auth=False, include_in_schema=False, path_root="/api/tasks")


def stream_settings() -> StreamSettings:
    """Return settings of short event streams: a stopping server waits for their end."""
    return StreamSettings(max_seconds=20.0)


Policies = Annotated[dict[str, Any], Depends(BaseAccessPolicy.all_used_access_policies)]
Stream = Annotated[StreamSettings, Depends(stream_settings)]


@open_access  # type: ignore[untyped-decorator]  # of diracx
@router.api_route("/{path:path}", methods=["GET", "HEAD", "POST"], response_model=None)
async def dashboard(
    path: str, request: Request, settings: AuthSettings, policies: Policies, config: ConfigReader, stream: Stream
) -> Response:
    """Forward the request to the dashboard, with the context of its authentication."""
    await context_from_environment()  # raises 503 if the broker is not configured
    return _Forwarded(_app(stream), DiracxAuthContext(request.app, settings, policies[POLICY].policy, config))


class _Forwarded(Response):
    """Response of the dashboard application to a forwarded request."""

    def __init__(self, app: DashboardApp, diracx: DiracxAuthContext) -> None:
        super().__init__()
        self._app = app
        self._diracx = diracx

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        root_path = str(scope.get("root_path", "")) + _ROOT_PATH
        state = {**scope.get("state", {}), "diracx": self._diracx}
        await self._app({**scope, "root_path": root_path, "state": state}, receive, send)


#: An application has one event loop; tests have many.
_of_loop: dict[asyncio.AbstractEventLoop, DashboardApp] = {}


def _app(stream: StreamSettings) -> DashboardApp:
    try:
        from ..dashboard.app import DashboardApp
    except ModuleNotFoundError as error:
        if error.name not in ("jinja2", "markupsafe"):
            raise
        raise HTTPException(
            HTTPStatus.SERVICE_UNAVAILABLE,
            f"the dashboard needs {error.name}: install it with `pip install 'diracx-tasks[dashboard]'`",
        ) from error

    loop = asyncio.get_running_loop()
    if (app := _of_loop.get(loop)) is None:
        app = DashboardApp(context_from_environment, DiracxBackend(CodeFlow(_ROOT_PATH)), stream=stream)
        _of_loop[loop] = app
        at_end_of_loop(_close)
    return app


async def _close() -> None:
    await _of_loop.pop(asyncio.get_running_loop()).aclose()
