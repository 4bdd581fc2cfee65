"""The way in and out: the sign-in page, the way to a provider and back, and what cookies keep of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Literal
from urllib.parse import quote, unquote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from ..dashboard.page import Form
from .backends import Gate, Offer, SignInError
from .middleware import CALLBACK, cookie_name

#: So long one may be away at a provider.
_AWAY_SECONDS = 300
#: Browsers keep no cookie of more than 4,096 bytes.
_LONGEST_TARGET = 3000
#: What was chosen last, for next time.
_CHOICE = "tasks-dashboard-choice"
_CHOICE_SECONDS = 365 * 86400

Handler = Callable[[Request], Awaitable[Response]]


class Door:
    """The handlers of `/sign-in…` and `/sign-out`.

    Args:
        gate: decides who comes in.
        page: renders a template: request, its name, what it shows, status.
    """

    def __init__(self, gate: Gate, page: Callable[[Request, str, dict[str, Any], int], Response]) -> None:
        self._gate = gate
        self._page = page

    def routes(self) -> Iterator[tuple[str, Handler, list[str]]]:
        """Paths, their handlers and methods."""
        yield "/sign-in", self._sign_in, ["GET", "POST"]
        yield "/sign-out", self._sign_out, ["POST"]
        if self._gate.provider is not None:
            yield "/sign-in/start", self._start, ["POST"]
            yield CALLBACK, self._callback, ["GET"]

    async def _sign_in(self, request: Request) -> Response:
        form = Form(getattr(request.state, "form", {}))
        target = own_path(form.one("next") or request.query_params.get("next", "/"))
        given = form.one("credential")
        if not given and self._gate.takes_links:
            # A link with the token is printed at the start of a dashboard; following it is signing in.
            given = request.query_params.get("token", "")
        if given:
            secret = await self._gate.sign_in(request, given)
            if secret is not None:
                response = RedirectResponse(root_of(request) + target, 303)
                set_cookie(response, request, cookie_name(request), secret)
                return response
        provider = self._gate.provider
        offer = await provider.offer(request) if provider is not None else Offer()
        context = {
            **_frame("Sign in"),
            "next": target,
            "refused": bool(given),
            "choices": offer.choices,
            "chosen": unquote(request.cookies.get(_CHOICE, "")),
            "why_not": offer.why_not,
            "credential": self._gate.credential,
            "hint": self._gate.hint,
        }
        return self._page(request, "sign_in.html", context, 403 if given else 200)

    async def _sign_out(self, request: Request) -> Response:
        await self._gate.sign_out(request.cookies.get(cookie_name(request), ""))
        response = RedirectResponse(f"{root_of(request)}/sign-in", 303)
        response.delete_cookie(cookie_name(request), path=root_of(request) or "/")
        return response

    async def _start(self, request: Request) -> Response:
        assert self._gate.provider is not None
        form = Form(request.state.form)
        target = own_path(form.one("next", "/"))
        try:
            address, kept = await self._gate.provider.begin(request, choice := form.one("choice"))
        except SignInError as error:
            return self._turned_away(request, error, target)
        response = self._on_to(request, "On to your identity provider", address)
        # The browser comes back from another site, and with it no cookie that is `strict`.
        where = root_of(request) + CALLBACK
        path = quote(target)
        value = kept + (path if len(path) < _LONGEST_TARGET else "/")
        set_cookie(response, request, _away(request), value, max_age=_AWAY_SECONDS, path=where, samesite="lax")
        set_cookie(response, request, _CHOICE, quote(choice), max_age=_CHOICE_SECONDS)
        return response

    async def _callback(self, request: Request) -> Response:
        assert self._gate.provider is not None
        kept, slash, rest = unquote(request.cookies.get(_away(request), "")).partition("/")
        target = own_path(slash + rest)
        try:
            credential = await self._gate.provider.finish(request, kept)
            if (secret := await self._gate.sign_in(request, credential)) is None:
                raise SignInError("You may not look at tasks here as what you have chosen.")
        except SignInError as error:
            response = self._turned_away(request, error, target)
        else:
            response = self._on_to(request, "You are signed in", root_of(request) + target)
            set_cookie(response, request, cookie_name(request), secret)
        response.delete_cookie(_away(request), path=root_of(request) + CALLBACK)
        return response

    def _on_to(self, request: Request, title: str, address: str) -> Response:
        """A page that goes on by itself.

        Where a redirection would do, it would not: as the answer to a form it must not leave for another site
        (`form-action`), and on the way back from one browsers send no cookies that are `strict`.
        """
        context = {**_frame(title), "problem": "", "address": address, "link": "Continue"}
        return self._page(request, "on_to.html", context, 200)

    def _turned_away(self, request: Request, error: SignInError, target: str) -> Response:
        again = f"{root_of(request)}/sign-in?next={quote(target, safe='')}"
        context = {**_frame("Not signed in"), "problem": str(error), "address": again, "link": "Sign in again"}
        return self._page(request, "on_to.html", context, 403)


def _frame(title: str) -> dict[str, Any]:
    return {"title": title, "nav": "", "label": "", "charts": None}


def _away(request: Request) -> str:
    return f"{cookie_name(request)}-away"


def root_of(request: Request) -> str:
    """The path of the place where the dashboard is mounted; empty at the top."""
    return str(request.scope.get("root_path", ""))


def own_path(text: str) -> str:
    """A path of ours, whatever was asked for: nobody is sent to another site."""
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
    """Have the browser keep something that no script sees.

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
