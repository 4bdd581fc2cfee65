"""Middleware of the dashboard for all routes: security headers, host names, sessions, CSRF protection."""

from __future__ import annotations

import hmac
from collections.abc import Collection, Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, quote, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from ..sse import event
from .backends import AuthBackend, Role, form_token
from .hosts import is_loopback

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: No content of other origins, no inline scripts and styles, no framing.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not `no-referrer`: browsers would send `Origin: null` with forms of the dashboard.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
FORM_FIELD = "form_token"
CALLBACK = "/sign-in/callback"
#: Paths that are open without a session.
SIGN_IN = ("/sign-in", "/sign-in/start", CALLBACK)
#: Maximum size in bytes of a form, with and without a session.
_LONGEST_FORM, _LONGEST_SIGN_IN = 1_000_000, 32_000
#: Maximum length in characters of a URL and of a form field.
_LONGEST_ADDRESS = _LONGEST_FIELD = 8_000
_MOST_FIELDS = 2_000


def cookie_name(request: Request) -> str:
    """Return the name of the session cookie. It includes the port, as all ports of a host share cookies."""
    return f"tasks-dashboard-{request.url.port or request.url.scheme}"


def path_below(scope: Scope) -> str:
    """Return the path relative to the mount point of the dashboard."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) if path.startswith(root) else path


class AuthMiddleware:
    """Checks every request before the dashboard handles it.

    Sets `principal`, `form_token`, `secure` (send cookies over TLS only) and, for a POST, `form` in the state of
    the request.

    Args:
        app: the wrapped application.
        backend: authentication back end.
        hosts: allowed host names; None for any. Protects against DNS rebinding.
    """

    def __init__(self, app: ASGIApp, backend: AuthBackend, hosts: Collection[str] | None = None) -> None:
        self._app = app
        self._backend = backend
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
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
        response: ASGIApp
        try:
            response = await self._check(request, path) or self._app
        except HTTPException as error:
            response = PlainTextResponse(f"{error.detail}\n", error.status_code, error.headers)
        await response(scope, receive, with_headers)

    async def _check(self, request: Request, path: str) -> Response | None:
        """Return the redirect to the sign-in if a request needs a session.

        Raises:
            HTTPException: the request is refused.
        """
        host = _host_of(request)
        # A TLS proxy connects without TLS, but with the public name.
        by_public_name = self._hosts is not None and not is_loopback(host or "")
        request.state.secure = request.url.scheme == "https" or by_public_name
        if self._hosts is not None and host not in self._hosts:
            raise HTTPException(HTTPStatus.MISDIRECTED_REQUEST, "this server has another host name")
        _check_url(request, path)
        # Pages of other ports of this host send the cookies, too, and could read the response.
        if request.headers.get("sec-fetch-mode", "navigate") != "navigate" and not _is_same_origin(request):
            raise HTTPException(HTTPStatus.FORBIDDEN, "only pages of the dashboard may fetch this")
        secret = request.cookies.get(cookie_name(request), "")
        principal = await self._backend.principal(request, secret) if secret else None
        request.state.principal = principal
        request.state.form_token = form_token(secret) if principal else ""
        if request.method == "POST":
            await _check_form(request, path)
        if principal is None and path not in SIGN_IN and not path.startswith("/static/"):
            return _to_sign_in(request, path)
        return None


async def _check_form(request: Request, path: str) -> None:
    if not _is_same_origin(request):
        raise HTTPException(HTTPStatus.FORBIDDEN, "this form comes from another site")
    principal = request.state.principal
    form = await _read_form(request, _LONGEST_SIGN_IN if principal is None else _LONGEST_FORM)
    request.state.form = form
    if path in SIGN_IN:
        return
    if principal is None:
        raise HTTPException(HTTPStatus.UNAUTHORIZED, "your session has expired; sign in again")
    [token] = form.get(FORM_FIELD, [""])[:1]
    if not hmac.compare_digest(token.encode(), request.state.form_token.encode()):
        raise HTTPException(HTTPStatus.FORBIDDEN, "this form is of another session; reload the page")
    if principal.role is not Role.WRITE and path != "/sign-out":
        raise HTTPException(HTTPStatus.FORBIDDEN, "your role is `read`, which allows no actions")


def _check_url(request: Request, path: str) -> None:
    if request.method not in ("GET", "HEAD", "POST"):
        raise HTTPException(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and POST", {"Allow": "GET, HEAD, POST"})
    if len(path) + len(request.url.query) > _LONGEST_ADDRESS:
        raise HTTPException(HTTPStatus.REQUEST_URI_TOO_LONG, "the URL is too long")
    if not _is_text([path, *request.query_params.values()]):
        raise HTTPException(HTTPStatus.BAD_REQUEST, "the URL has invalid characters")


def _host_of(request: Request) -> str | None:
    """Return the host of a request, without the port."""
    try:
        return urlsplit(f"//{request.headers.get('host', '')}").hostname
    except ValueError:
        return None


def _is_text(values: Iterable[str]) -> bool:
    """True if the values have neither NUL nor surrogates, which databases, keys and pages cannot store."""
    return not any(character == "\0" or "\ud800" <= character <= "\udfff" for text in values for character in text)


async def _read_form(request: Request, longest: int) -> dict[str, list[str]]:
    """Read the fields of a form."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > longest:
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the form is too long")
    try:
        form = parse_qs(body.decode(), keep_blank_values=True, max_num_fields=_MOST_FIELDS)
    except ValueError as error:
        raise HTTPException(HTTPStatus.BAD_REQUEST, "the form cannot be decoded") from error
    values = [value for values in form.values() for value in values]
    if any(len(value) > _LONGEST_FIELD for value in values):
        raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "a field of the form is too long")
    if not _is_text(values):
        raise HTTPException(HTTPStatus.BAD_REQUEST, "the form has invalid characters")
    return form


def _is_same_origin(request: Request) -> bool:
    """True if a page of the dashboard sent the request, or a client that is no browser and has no such headers."""
    site = request.headers.get("sec-fetch-site")
    if site is not None and site not in ("same-origin", "none"):
        return False
    origin = request.headers.get("origin")
    return origin is None or origin.partition("://")[2] == request.headers.get("host")


def _to_sign_in(request: Request, path: str) -> Response:
    if request.headers.get("accept") == "text/event-stream":
        # Scripts cannot see why an event stream was refused, and would try again endlessly.
        return Response(event("gone", "your session has expired"), media_type="text/event-stream")
    if "hx-request" in request.headers:
        raise HTTPException(HTTPStatus.UNAUTHORIZED, "your session has expired; sign in again")
    query = f"?{request.url.query}" if request.url.query else ""
    page = f"{request.scope.get('root_path', '')}/sign-in"
    return RedirectResponse(f"{page}?next={quote(path + query, safe='')}", HTTPStatus.SEE_OTHER)
