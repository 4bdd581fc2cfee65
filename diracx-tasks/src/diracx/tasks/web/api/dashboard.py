"""The dashboard below `/api/tasks/dashboard/`, with the tokens and the access policy of DiracX."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any
from weakref import WeakKeyDictionary

from diracx.core.settings import AuthSettings
from diracx.routers.access_policies import BaseAccessPolicy, open_access
from diracx.routers.fastapi_classes import DiracxRouter
from fastapi import Depends, HTTPException, Request, Response

from ..auth.code_flow import CodeFlow
from ..auth.diracx import POLICY, DiracxAuthContext, DiracxBackend
from ..auth.policies import ConfigReader
from ..sse import StreamSettings
from .environment import context_of_environment

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from ..dashboard.app import DashboardApp

_BELOW = "/api/tasks/dashboard"

# It has a sign-in of its own, for browsers send no `Authorization` by themselves. It is no interface for programs.
router = DiracxRouter(require_auth=False, include_in_schema=False, path_root="/api/tasks")


def stream_settings() -> StreamSettings:
    """Streams are short: the application is not told when its server stops, and the server waits for them."""
    return StreamSettings(max_seconds=20.0)


Policies = Annotated[dict[str, Any], Depends(BaseAccessPolicy.all_used_access_policies)]
Stream = Annotated[StreamSettings, Depends(stream_settings)]


@open_access  # type: ignore[untyped-decorator]  # of diracx
@router.api_route("/{path:path}", methods=["GET", "HEAD", "POST"], response_model=None)
async def dashboard(
    path: str, request: Request, settings: AuthSettings, policies: Policies, config: ConfigReader, stream: Stream
) -> Response:
    """Hand the request on to the dashboard, with what its back end needs."""
    await context_of_environment()  # says what is missing, as any other route does
    return _HandedOn(_app(stream), DiracxAuthContext(request.app, settings, policies[POLICY].policy, config))


class _HandedOn(Response):
    """The answer that the dashboard gives."""

    def __init__(self, app: DashboardApp, diracx: DiracxAuthContext) -> None:
        super().__init__()
        self._app = app
        self._diracx = diracx

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        below = str(scope.get("root_path", "")) + _BELOW
        state = {**scope.get("state", {}), "diracx": self._diracx}
        await self._app({**scope, "root_path": below, "state": state}, receive, send)


#: An application has one event loop; tests have many.
_of_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, DashboardApp] = WeakKeyDictionary()


def _app(stream: StreamSettings) -> DashboardApp:
    try:
        from ..dashboard.app import create_app
    except ModuleNotFoundError as error:
        if error.name not in ("jinja2", "markupsafe"):
            raise
        # The route is there wherever this distribution is, with the extra or without.
        raise HTTPException(
            HTTPStatus.SERVICE_UNAVAILABLE,
            f"the dashboard needs {error.name}: pip install 'diracx-tasks[dashboard]' where this application runs",
        ) from error

    loop = asyncio.get_running_loop()
    if (app := _of_loop.get(loop)) is None:
        app = create_app(context_of_environment, DiracxBackend(CodeFlow(_BELOW)), stream=stream)
        _of_loop[loop] = app
    return app
