"""ASGI application of the dashboard: pages, their event streams, and actions with confirmation."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Hashable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from diracx.core.exceptions import NotReadyError
from diracx.db.exceptions import DBUnavailableError
from fastapi import FastAPI
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles

from ...plumbing._util.passwords import mask
from ...plumbing.broker.inspection import server_time
from ...plumbing.broker.stored import UnreadableKeyError
from ...plumbing.exceptions import SendTaskError
from ...plumbing.plugins import load_plugin
from ...plumbing.sql.errors import DatabaseError
from ..auth.backends import AuthBackend
from ..auth.middleware import AuthMiddleware, cookie_name, path_below
from ..auth.routes import AuthRoutes, own_path, root_of, set_cookie
from ..context import AppContext
from ..operator import NotPossibleError, Operator
from ..sse import EventStreams, StreamSettings
from .page import Action, Extension, Form, NotFoundError, Page, Question, UnavailableError, viewer_of
from .pages import ACTIONS, PAGES
from .rendering import STATIC, environment, text_of

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "diracx.tasks_dashboard"
_FLASH = "tasks-dashboard-flash"
#: Timeouts of `/readyz`.
_READY_SECONDS = 2.0
_ALERTS_SECONDS = 0.5
_PROBE_HEADERS = {"Allow": "GET, HEAD", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
_SECTIONS = ("Monitoring", "Problems", "Control", "Pilots", "History")


def installed_extensions() -> list[Extension]:
    """Load the pages of other installed distributions; log those that cannot be loaded."""
    from importlib.metadata import entry_points

    found = []
    for entry_point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda each: each.name):
        try:
            found.append(load_plugin(entry_point.load)())
        except Exception:
            logger.exception("the pages %r of the dashboard cannot be loaded", entry_point.value)
    return found


class DashboardApp:
    """The dashboard, for its own server or to be mounted in another application.

    It opens its resources with its lifespan, or else at its first request.

    Args:
        context: opens the data source; called once, before the first page.
        backend: authentication back end.
        hosts: allowed host names; None for any.
        extensions: additional pages; by default all that are installed.
        stream: settings of event streams.
    """

    def __init__(
        self,
        context: Callable[[], Awaitable[AppContext]],
        backend: AuthBackend,
        *,
        hosts: Collection[str] | None = None,
        extensions: Sequence[Extension] | None = None,
        stream: StreamSettings | None = None,
    ) -> None:
        self._open_context = context
        self._context: AppContext | None = None
        self._backend = backend
        self._extensions = installed_extensions() if extensions is None else extensions
        self.streams = EventStreams(stream or StreamSettings())
        self._opening = asyncio.Lock()
        self._stack = AsyncExitStack()
        self._templates = environment(*(each.templates for each in self._extensions if each.templates is not None))
        pages = [*PAGES, *(page for extension in self._extensions for page in extension.pages)]
        actions = [*ACTIONS, *(action for extension in self._extensions for action in extension.actions)]
        self._navigation = _navigation(pages)
        self._app = AuthMiddleware(self._routes(pages, actions), backend, hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] == "http":
            if (path := path_below(scope)) in ("/healthz", "/readyz"):
                await (await self._probe(path, scope["method"]))(scope, receive, send)
                return
            await self.open()
        await self._app(scope, receive, send)

    async def _probe(self, path: str, method: str) -> Response:
        """Respond to a probe for liveness or readiness, without token and for any host name."""
        if method not in ("GET", "HEAD"):
            return PlainTextResponse("only GET and HEAD\n", HTTPStatus.METHOD_NOT_ALLOWED, _PROBE_HEADERS)
        ready, lines = await self._readiness() if path == "/readyz" else (True, [])
        text = "\n".join(["ok" if ready else "not ready", *lines, ""])
        status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
        return PlainTextResponse(text, status, _PROBE_HEADERS)

    async def _readiness(self) -> tuple[bool, list[str]]:
        """Return whether it is open and its server responds, and the names of the alerts."""
        if self.streams.closing.is_set():
            return False, []
        try:
            await self.open()
            redis = self.context.redis
            async with asyncio.timeout(_READY_SECONDS):
                await self.context.responses.get("ready", lambda: server_time(redis), 1.0)
        except Exception:
            logger.debug("not ready", exc_info=True)
            return False, ["critical server_away"]
        try:
            async with asyncio.timeout(_ALERTS_SECONDS):
                return True, (await self.context.health()).names()
        except Exception:  # a slow database does not make the dashboard unready
            logger.debug("no alerts", exc_info=True)
            return True, []

    async def open(self) -> None:
        """Open the resources of all pages, unless they are open."""
        async with self._opening:
            if self._context is not None:
                return
            async with AsyncExitStack() as stack:
                for extension in self._extensions:
                    await stack.enter_async_context(extension.lifespan())
                self._context = await self._open_context()
                # After a failure the resources opened so far are closed, and the next request tries again.
                self._stack = stack.pop_all()

    def end_streams(self) -> None:
        """End all event streams, so that the server can stop."""
        self.streams.closing.set()

    async def aclose(self) -> None:
        """Close the resources of extensions and health checks."""
        self.end_streams()
        if self._context is not None:
            await self._context.aclose()
        await self._stack.aclose()

    def _routes(self, pages: Sequence[Page], actions: Sequence[Action]) -> FastAPI:
        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            await self.open()
            yield
            await self.aclose()

        app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan)
        app.mount("/static", _ImmutableFiles(directory=STATIC))
        for path, handler, methods in AuthRoutes(self._backend, self._page).routes():
            app.add_route(path, handler, methods=methods)
        for page in pages:
            app.add_route(page.path, self._page_handler(page), methods=["GET"])
            if page.live:
                app.add_route("/live" + page.path, self._stream_handler(page), methods=["GET"])
        for action in actions:
            app.add_route(action.path, self._action_handler(action), methods=["POST"])
        expected: list[type[Exception]] = [HTTPException, *_ERRORS]
        for kind in (*expected, Exception):
            app.add_exception_handler(kind, self._failed)
        return app

    @property
    def context(self) -> AppContext:
        """Data source of the pages."""
        assert self._context is not None
        return self._context

    # --- pages ------------------------------------------------------------------------------------------

    def _page_handler(self, page: Page) -> Callable[[Request], Awaitable[Response]]:
        async def show(request: Request) -> Response:
            _check_visible(page, request)
            values = await self._load(page, request)
            # The event stream of the page must not begin with older values.
            key, seconds = _cache_key(page, request, "page"), self.streams.settings.shared_seconds
            self.context.responses.put(key, values, seconds)
            charts = None if page.charts is None else json.dumps(await page.charts(request, self.context))
            return self._page(request, [f"{page.name}.html", "live.html"], {**values, "charts": charts})

        return show

    def _stream_handler(self, page: Page) -> Callable[[Request], Awaitable[Response]]:
        async def stream(request: Request) -> Response:
            _check_visible(page, request)

            async def shared(part: str, load: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
                key, seconds = _cache_key(page, request, part), self.streams.settings.shared_seconds
                return await self.context.responses.get(key, load, seconds)

            async def render() -> dict[str, str]:
                try:
                    values = await shared("page", lambda: self._load(page, request))
                    fragment = text_of(self._templates, request, [f"_{page.name}.html", "_table.html"], values)
                    events = {"fragment": fragment, "problem": ""}
                    if (load := page.charts) is not None:
                        events["charts"] = json.dumps(await shared("charts", lambda: load(request, self.context)))
                except Exception as error:
                    events = {"problem": mask(_explained(request, error)[1])}
                return events

            async def is_allowed() -> bool:
                secret = request.cookies.get(cookie_name(request), "")
                return await self._backend.principal(request, secret) is not None

            return self.streams.response(request.state.principal.name, render, is_allowed)

        return stream

    async def _load(self, page: Page, request: Request) -> dict[str, Any]:
        try:
            values = await page.load(request, self.context)
        except ValueError as error:
            if not request.query_params:  # not caused by the request
                raise
            raise NotFoundError(str(error)) from error
        return {
            "title": page.title,
            "page_name": page.name,
            "parent": None,
            "nav": page.nav or page.path,
            "live": page.live,
            "label": self.context.label,
            **values,
        }

    def _page(
        self, request: Request, template: str | list[str], values: dict[str, Any], status: int = 200
    ) -> Response:
        flash = _flash(request)
        defaults = {"nav": "", "label": "", "charts": None, "live": False}
        context = {**defaults, "navigation": self._navigation, "flash": flash, **values}
        response = HTMLResponse(text_of(self._templates, request, template, context), status)
        if flash is not None:
            response.delete_cookie(_FLASH, path=root_of(request) or "/")
        return response

    async def _failed(self, request: Request, error: Exception) -> Response:
        status, text = _explained(request, error)
        return self._page(request, "error.html", {"title": HTTPStatus(status).phrase, "text": text}, status)

    # --- actions ----------------------------------------------------------------------------------------

    def _action_handler(self, action: Action) -> Callable[[Request], Awaitable[Response]]:
        async def perform(request: Request) -> Response:
            _check_visible(action, request)
            form = Form(request.state.form)
            if form.one("confirmed") != "yes":
                return await self._confirm(request, action, form)
            principal = request.state.principal
            operator = Operator(self.context, principal.name, "dashboard", principal.vo)
            try:
                outcome, ok = await action.do(form, operator), True
            except (NotPossibleError, ValueError) as error:
                outcome, ok = str(error), False
            response = RedirectResponse(root_of(request) + own_path(form.one("next", "/")), HTTPStatus.SEE_OTHER)
            flash = quote(json.dumps({"ok": ok, "text": outcome[:500]}))
            set_cookie(response, request, _FLASH, flash, max_age=60)
            return response

        return perform

    async def _confirm(self, request: Request, action: Action, form: Form) -> Response:
        question: Question | None = None
        problem = ""
        try:
            question = await action.ask(form, self.context)
        except (NotPossibleError, ValueError) as error:
            problem = str(error)
        values = {
            "question": question,
            "problem": problem,
            "action": action.path,
            "fields": [
                (name, value)
                for name, values in {**form.fields, **(question.fields if question else {})}.items()
                if name not in ("form_token", "confirmed", "next")
                for value in values
            ],
            "next": own_path(form.one("next", "/")),
        }
        if "hx-request" in request.headers:
            return HTMLResponse(text_of(self._templates, request, "_question.html", values))
        title = question.title if question else "Not possible"
        return self._page(request, "question.html", {"title": title, "label": self.context.label, **values})


def _check_visible(route: Page | Action, request: Request) -> None:
    """Refuse a page or an action about all VOs to a principal of one VO."""
    if not route.per_vo and not viewer_of(request).sees(None):
        raise HTTPException(
            HTTPStatus.FORBIDDEN,
            "This is about all VOs: it needs the property ServiceAdministrator.",
        )


class _ImmutableFiles(StaticFiles):
    """Static files that browsers cache permanently; their URLs have a version."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """Add the cache header to the response of `StaticFiles`."""
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "public, max-age=31536000, immutable"
        return response


_DATABASE_AWAY = "The database does not respond; the log has the reason."

#: Expected errors of pages: status, and text for users.
_ERRORS: dict[type[Exception], tuple[int, Callable[[Any], str]]] = {
    NotFoundError: (404, str),
    NotPossibleError: (409, str),
    UnavailableError: (503, str),
    UnreadableKeyError: (503, str),
    SendTaskError: (503, str),
    RedisError: (503, "The Redis server of the tasks does not respond; the log has the reason.".format),
    NotReadyError: (503, "The configuration of DiracX is being read; reload this page in some seconds.".format),
    DatabaseError: (503, lambda error: f"{str(error)[0].upper()}{str(error)[1:]}."),
    SQLAlchemyError: (503, _DATABASE_AWAY.format),
    DBUnavailableError: (503, _DATABASE_AWAY.format),
}


def _explained(request: Request, error: Exception) -> tuple[int, str]:
    """Return status and text of an error, for users."""
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail)
    for kind in type(error).__mro__:
        if kind in _ERRORS:
            if isinstance(error, DBUnavailableError | RedisError | SQLAlchemyError):
                detail = error.detail if isinstance(error, DatabaseError) else error
                logger.warning("%s %.200r: %s", request.method, request.url.path, detail)
            status, text = _ERRORS[kind]
            return status, text(error)
    logger.error("%s %.200r", request.method, request.url.path, exc_info=error)
    return 500, "Internal error; the log of the dashboard has the details."


def _cache_key(page: Page, request: Request, part: str) -> Hashable:
    """Return the cache key of a part of a page; requests with equal keys share it."""
    query, path = sorted(request.query_params.multi_items()), sorted(request.path_params.items())
    return part, page.path, tuple(path), tuple(query), request.state.principal.vo


def _navigation(pages: Sequence[Page]) -> list[tuple[str, list[Page]]]:
    sections: dict[str, list[Page]] = {name: [] for name in _SECTIONS}
    for page in pages:
        if page.section is not None:
            sections.setdefault(page.section, []).append(page)
    return [(name, listed) for name, listed in sections.items() if listed]


def _flash(request: Request) -> dict[str, Any] | None:
    try:
        flash = json.loads(unquote(request.cookies.get(_FLASH, "")))
        return {"ok": bool(flash["ok"]), "text": str(flash["text"])}
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
