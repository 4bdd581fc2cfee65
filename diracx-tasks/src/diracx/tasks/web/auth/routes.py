"""Routes of sign-in and sign-out: the page, the redirect to an identity provider, and their cookies."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from urllib.parse import quote, unquote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from ..forms import Form
from .backends import AuthBackend, LoginOptions, SignInError
from .middleware import CALLBACK, cookie_name

#: Timeout of a sign-in at an identity provider.
_STATE_SECONDS = 300
#: Browsers keep no cookie of more than 4,096 bytes.
_LONGEST_TARGET = 3000
#: Cookie with the last choice.
_CHOICE = "tasks-dashboard-choice"
_CHOICE_SECONDS = 365 * 86400

Handler = Callable[[Request], Awaitable[Response]]
Renderer = Callable[[Request, str, dict[str, Any], int], Response]


class AuthRoutes:
    """Routes `/sign-in…` and `/sign-out`.

    Args:
        backend: authentication back end.
        page: renders a template, given request, name, context and status.
    """

    def __init__(self, backend: AuthBackend, page: Renderer) -> None:
        self._backend = backend
        self._page = page

    def routes(self) -> Iterator[tuple[str, Handler, list[str]]]:
        """Return paths, handlers and methods."""
        yield "/sign-in", self._sign_in, ["GET", "POST"]
        yield "/sign-out", self._sign_out, ["POST"]
        if self._backend.provider is not None:
            yield "/sign-in/start", self._start, ["POST"]
            yield CALLBACK, self._callback, ["GET"]

    async def _sign_in(self, request: Request) -> Response:
        form = Form(getattr(request.state, "form", {}))
        target = own_path(form.one("next") or request.query_params.get("next", "/"))
        given = form.one("credential")
        if not given and self._backend.takes_links:
            # The stand-alone dashboard prints a URL with the token at its start.
            given = request.query_params.get("token", "")
        if given:
            secret = await self._backend.sign_in(request, given)
            if secret is not None:
                response = RedirectResponse(root_of(request) + target, 303)
                set_cookie(response, request, cookie_name(request), secret)
                return response
        provider = self._backend.provider
        options = await provider.options(request) if provider is not None else LoginOptions()
        context = {
            "title": "Sign in",
            "next": target,
            "refused": bool(given),
            "choices": options.choices,
            "chosen": unquote(request.cookies.get(_CHOICE, "")),
            "unavailable_reason": options.unavailable_reason,
            "credential": self._backend.credential,
            "hint": self._backend.hint,
        }
        return self._page(request, "sign_in.html", context, 403 if given else 200)

    async def _sign_out(self, request: Request) -> Response:
        await self._backend.sign_out(request.cookies.get(cookie_name(request), ""))
        response = RedirectResponse(f"{root_of(request)}/sign-in", 303)
        response.delete_cookie(cookie_name(request), path=root_of(request) or "/")
        return response

    async def _start(self, request: Request) -> Response:
        assert self._backend.provider is not None
        form = Form(request.state.form)
        target = own_path(form.one("next", "/"))
        try:
            address, kept = await self._backend.provider.begin(request, choice := form.one("choice"))
        except SignInError as error:
            return self._refused(request, error, target)
        response = self._redirect_page(request, "Redirecting to your identity provider", address)
        # `lax`: browsers send no `strict` cookie when another site redirects back.
        callback = root_of(request) + CALLBACK
        path = quote(target)
        value = kept + (path if len(path) < _LONGEST_TARGET else "/")
        set_cookie(
            response, request, _state_cookie(request), value, max_age=_STATE_SECONDS, path=callback, samesite="lax"
        )
        set_cookie(response, request, _CHOICE, quote(choice), max_age=_CHOICE_SECONDS)
        return response

    async def _callback(self, request: Request) -> Response:
        assert self._backend.provider is not None
        kept, slash, rest = unquote(request.cookies.get(_state_cookie(request), "")).partition("/")
        target = own_path(slash + rest)
        try:
            credential = await self._backend.provider.finish(request, kept)
            if (secret := await self._backend.sign_in(request, credential)) is None:
                raise SignInError("The VO and group that you have chosen have no access to the tasks.")
        except SignInError as error:
            response = self._refused(request, error, target)
        else:
            response = self._redirect_page(request, "You are signed in", root_of(request) + target)
            set_cookie(response, request, cookie_name(request), secret)
        response.delete_cookie(_state_cookie(request), path=root_of(request) + CALLBACK)
        return response

    def _redirect_page(self, request: Request, title: str, address: str) -> Response:
        """Return a page that redirects by `meta refresh`.

        An HTTP redirect does not work: `form-action` forbids one to another site as the response to a form, and
        browsers send no `strict` cookies after one from another site.
        """
        context = {"title": title, "problem": "", "address": address, "link": "Continue"}
        return self._page(request, "redirect.html", context, 200)

    def _refused(self, request: Request, error: SignInError, target: str) -> Response:
        again = f"{root_of(request)}/sign-in?next={quote(target, safe='')}"
        context = {"title": "Not signed in", "problem": str(error), "address": again, "link": "Sign in again"}
        return self._page(request, "redirect.html", context, 403)


def _state_cookie(request: Request) -> str:
    return f"{cookie_name(request)}-state"


def root_of(request: Request) -> str:
    """Return the path at which the dashboard is mounted; empty at the top."""
    return str(request.scope.get("root_path", ""))


def own_path(text: str) -> str:
    """Return the path if it is one of the dashboard, else `/`, so that no redirect leads to another site."""
    plain = text.startswith("/") and not text.startswith(("//", "/\\")) and text.isprintable()
    return text if plain and "\\" not in text else "/"


def set_cookie(response: Response, request: Request, name: str, value: str, **options: Any) -> None:
    """Set a cookie that scripts cannot read, by default for all pages and until the browser is closed."""
    defaults = {"path": root_of(request) or "/", "samesite": "strict", "secure": request.state.secure}
    response.set_cookie(name, value, httponly=True, **(defaults | options))
