"""Sign-in and sign-out: the page, the redirect to an identity provider and back, and their cookies."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Literal
from urllib.parse import quote, unquote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from ..forms import Form
from .backends import AuthBackend, LoginOptions, SignInError
from .middleware import CALLBACK, cookie_name

#: How long a sign-in at an identity provider may take.
_STATE_SECONDS = 300
#: Browsers keep no cookie of more than 4,096 bytes.
_LONGEST_TARGET = 3000
#: What was chosen last, for next time.
_CHOICE = "tasks-dashboard-choice"
_CHOICE_SECONDS = 365 * 86400

Handler = Callable[[Request], Awaitable[Response]]
Renderer = Callable[[Request, str, dict[str, Any], int], Response]


class AuthRoutes:
    """Routes `/sign-in…` and `/sign-out`.

    Args:
        backend: decides who may sign in.
        page: renders a template: request, its name, what it shows, status.
    """

    def __init__(
        self, backend: AuthBackend, page: Callable[[Request, str, dict[str, Any], int], Response]
    ) -> None:
        self._backend = backend
        self._page = page

    def routes(self) -> Iterator[tuple[str, Handler, list[str]]]:
        """Paths, their handlers and methods."""
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
            # A link with the token is printed at the start of a dashboard; following it is signing in.
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
            **_frame("Sign in"),
            "next": target,
            "refused": bool(given),
            "choices": options.choices,
            "chosen": unquote(request.cookies.get(_CHOICE, "")),
            "why_not": options.why_not,
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
        # The browser comes back from another site, and with it no cookie that is `strict`.
        where = root_of(request) + CALLBACK
        path = quote(target)
        value = kept + (path if len(path) < _LONGEST_TARGET else "/")
        set_cookie(
            response, request, _state_cookie(request), value, max_age=_STATE_SECONDS, path=where, samesite="lax"
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
                raise SignInError("You may not look at tasks here as what you have chosen.")
        except SignInError as error:
            response = self._refused(request, error, target)
        else:
            response = self._redirect_page(request, "You are signed in", root_of(request) + target)
            set_cookie(response, request, cookie_name(request), secret)
        response.delete_cookie(_state_cookie(request), path=root_of(request) + CALLBACK)
        return response

    def _redirect_page(self, request: Request, title: str, address: str) -> Response:
        """Return a page that redirects by itself.

        An HTTP redirect does not work here: as the answer to a form it must not leave for another site
        (`form-action`), and on the way back from one browsers send no cookies that are `strict`.
        """
        context = {**_frame(title), "problem": "", "address": address, "link": "Continue"}
        return self._page(request, "redirect.html", context, 200)

    def _refused(self, request: Request, error: SignInError, target: str) -> Response:
        again = f"{root_of(request)}/sign-in?next={quote(target, safe='')}"
        context = {**_frame("Not signed in"), "problem": str(error), "address": again, "link": "Sign in again"}
        return self._page(request, "redirect.html", context, 403)


def _frame(title: str) -> dict[str, Any]:
    return {"title": title, "nav": "", "label": "", "charts": None}


def _state_cookie(request: Request) -> str:
    return f"{cookie_name(request)}-state"


def root_of(request: Request) -> str:
    """Return the path that the dashboard is mounted at; empty at the top."""
    return str(request.scope.get("root_path", ""))


def own_path(text: str) -> str:
    """Return a path of the dashboard, whatever was asked for: no redirect leaves for another site."""
    plain = text.startswith("/") and not text.startswith(("//", "/\\")) and text.isprintable()
    return text if plain and "\\" not in text else "/"


def set_cookie(
    response: Response,
    request: Request,
    name: str,
    value: str,
    *,
    max_age: int | None = None,
    path: str | None = None,
    samesite: Literal["lax", "strict"] = "strict",
) -> None:
    """Set a cookie that scripts cannot read.

    Args:
        max_age: seconds; None: until the browser is closed.
        path: below which it is sent; by default to all pages of the dashboard.
        samesite: `lax`: links of other sites bring it along, too.
    """
    where = path or root_of(request) or "/"
    response.set_cookie(
        name,
        value,
        max_age=max_age,
        path=where,
        httponly=True,
        samesite=samesite,
        secure=request.state.secure,
    )
