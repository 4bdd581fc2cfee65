"""Middleware of the dashboard: security headers, host names, sessions, and protection against forged forms.

It guards every route, those that are added later as well.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection, Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from ..sse import event
from .backends import AuthBackend, Role, form_token
from .hosts import is_loopback

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Everything comes from here, nothing is written into the page, nobody may frame it.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not `no-referrer`: browsers would then send `Origin: null` with our own forms.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
FORM_FIELD = "form_token"
CALLBACK = "/sign-in/callback"
#: Paths that are open without a session.
SIGN_IN = ("/sign-in", "/sign-in/start", CALLBACK)
#: Bytes of a form, and of a form without a session.
_LONGEST_FORM, _LONGEST_SIGN_IN = 1_000_000, 32_000
#: Characters of an address and of one field: keys of locks, and tokens, are the longest.
_LONGEST_ADDRESS = _LONGEST_FIELD = 8_000
#: Values in a form: more dead letters than a page has.
_MOST_FIELDS = 2_000


def cookie_name(request: Request) -> str:
    """Return the name of the session cookie: it has the port, for cookies are the same on all ports of a host."""
    return f"tasks-dashboard-{request.url.port or request.url.scheme}"


def path_below(scope: Scope) -> str:
    """Return the path below the one that the dashboard is mounted at."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) if path.startswith(root) else path


class AuthMiddleware:
    """Checks every request before the dashboard sees it.

    Puts `principal`, `form_token`, `secure` (cookies go over TLS only) and, for a POST, `form` into the state of
    the request.

    Args:
        app: the application behind it.
        backend: decides who may sign in.
        hosts: names by which the server may be called; None for any. Keeps a name that an attacker points
            to this address from being the same origin as ours.
    """

    def __init__(self, app: ASGIApp, backend: AuthBackend, hosts: Collection[str] | None = None) -> None:
        self._app = app
        self._backend = backend
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = path_below(scope)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                if not path.startswith("/static/"):
                    headers.setdefault("Cache-Control", "no-store")
            await send(message)

        request = Request(scope, receive)
        refusal = await self._refusal(request, path)
        await (refusal or self._app)(scope, receive, with_headers)

    async def _refusal(self, request: Request, path: str) -> Response | None:
        called = _host_of(request)
        # A proxy that speaks TLS asks us without, but by the name that browsers know.
        by_public_name = self._hosts is not None and not is_loopback(called or "")
        request.state.secure = request.url.scheme == "https" or by_public_name
        if self._hosts is not None and called not in self._hosts:
            return _plain(HTTPStatus.MISDIRECTED_REQUEST, "this server has another name")
        if (refusal := _about_address(request, path)) is not None:
            return refusal
        # Pages of the same host on other ports get the cookies along, and could read what they fetch.
        if request.headers.get("sec-fetch-mode", "navigate") != "navigate" and not _from_here(request):
            return _plain(HTTPStatus.FORBIDDEN, "this is for pages of the dashboard only")
        secret = request.cookies.get(cookie_name(request), "")
        principal = await self._backend.principal(request, secret) if secret else None
        request.state.principal = principal
        request.state.form_token = form_token(secret) if principal else ""
        if request.method == "POST":
            refusal = await self._about_form(request, path)
            if refusal is not None:
                return refusal
        if principal is None and not _is_open(path):
            return _to_sign_in(request, path)
        return None

    async def _about_form(self, request: Request, path: str) -> Response | None:
        if not _from_here(request):
            return _plain(HTTPStatus.FORBIDDEN, "this form comes from another site")
        form = await _read_form(request, _LONGEST_SIGN_IN if request.state.principal is None else _LONGEST_FORM)
        if isinstance(form, Response):
            return form
        request.state.form = form
        return None if path in SIGN_IN else self._about_sender(request, path, form)

    def _about_sender(self, request: Request, path: str, form: dict[str, list[str]]) -> Response | None:
        principal = request.state.principal
        if principal is None:
            return _plain(HTTPStatus.UNAUTHORIZED, "your session is over; sign in again")
        [brought] = form.get(FORM_FIELD, [""])[:1]
        if not hmac.compare_digest(brought.encode(), request.state.form_token.encode()):
            return _plain(HTTPStatus.FORBIDDEN, "this form is of another session; load the page again")
        if principal.role is not Role.WRITE and path != "/sign-out":
            return _plain(HTTPStatus.FORBIDDEN, "you may look, not act: your role is `read`")
        return None


def _about_address(request: Request, path: str) -> Response | None:
    if request.method not in ("GET", "HEAD", "POST"):
        return _plain(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and POST")
    if len(path) + len(request.url.query) > _LONGEST_ADDRESS:
        return _plain(HTTPStatus.REQUEST_URI_TOO_LONG, "this address is too long")
    if not _is_text([path, *request.query_params.values()]):
        return _plain(HTTPStatus.BAD_REQUEST, "this address has characters that no text has")
    return None


def _host_of(request: Request) -> str | None:
    """Return the host of a request, without the port."""
    try:
        return urlsplit(f"//{request.headers.get('host', '')}").hostname
    except ValueError:
        return None


def _is_open(path: str) -> bool:
    return path in SIGN_IN or path.startswith("/static/")


def _is_text(values: Iterable[str]) -> bool:
    """True if databases, keys and pages can take these values: no NUL, no half of a character."""
    return not any(character == "\0" or "\ud800" <= character <= "\udfff" for text in values for character in text)


async def _read_form(request: Request, longest: int) -> dict[str, list[str]] | Response:
    """The fields of a form, or what is wrong with it."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > longest:
            return _plain(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "this form is too long")
    form: dict[str, list[str]] = {}
    try:
        fields = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=_MOST_FIELDS)
    except ValueError:
        return _plain(HTTPStatus.BAD_REQUEST, "this form cannot be read")
    if any(len(value) > _LONGEST_FIELD for _, value in fields):
        return _plain(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "a field of this form is too long")
    if not _is_text(value for _, value in fields):
        return _plain(HTTPStatus.BAD_REQUEST, "this form has characters that no text has")
    for name, value in fields:
        form.setdefault(name, []).append(value)
    return form


def _from_here(request: Request) -> bool:
    """True if a page of the dashboard sent the request. Browsers say so; clients that do not are no browsers."""
    site = request.headers.get("sec-fetch-site")
    if site is not None and site not in ("same-origin", "none"):
        return False
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == request.headers.get("host")


def _to_sign_in(request: Request, path: str) -> Response:
    if request.headers.get("accept") == "text/event-stream":
        # Of a refusal a page would learn nothing, and try again for ever.
        return Response(event("gone", "your session is over"), media_type="text/event-stream")
    if "hx-request" in request.headers:
        return _plain(HTTPStatus.UNAUTHORIZED, "your session is over; sign in again")
    query = f"?{request.url.query}" if request.url.query else ""
    where = f"{request.scope.get('root_path', '')}/sign-in"
    return RedirectResponse(f"{where}?next={quote(path + query, safe='')}", HTTPStatus.SEE_OTHER)


def _plain(status: HTTPStatus, text: str) -> Response:
    return PlainTextResponse(text + "\n", status)
