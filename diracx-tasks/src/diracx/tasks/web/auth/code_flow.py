"""Sign-in to the dashboard with DiracX's authorization-code flow and PKCE (RFC 6749 4.1, RFC 7636).

The browser keeps one secret during the flow: the code verifier, in a cookie. Challenge and state are one-way
functions of it. DiracX's token endpoint is asked within this process; of its answer only
the access token is used, and the refresh token forgotten.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import secrets
from collections.abc import Iterable
from http import HTTPStatus
from urllib.parse import urlencode

import httpx2
from diracx.routers.utils.users import AuthorizedUserInfo
from fastapi import Request
from starlette.routing import NoMatchFound

from .backends import LoginChoice, LoginOptions, Role, SignInError
from .diracx import DiracxAuthContext, role_of
from .middleware import CALLBACK
from .routes import root_of

logger = logging.getLogger(__name__)

_SETTING = "DIRACX_SERVICE_AUTH_ALLOWED_REDIRECTS"
_MAY = {Role.READ: "may look", Role.WRITE: "may look and act"}


class CodeFlow:
    """See `LoginProvider`.

    Args:
        below: the path of the dashboard in the application.
    """

    def __init__(self, below: str) -> None:
        self._below = below

    async def options(self, request: Request) -> LoginOptions:
        """See `LoginProvider`. The groups of all VOs that the access policy allows."""
        diracx: DiracxAuthContext = request.state.diracx
        if _path_of(diracx, "initiate_authorization_flow") is None:
            return LoginOptions()
        if (redirect := _redirect_uri(request)) not in diracx.settings.allowed_redirects:
            return LoginOptions(why_not=f"To sign in without a token, have {redirect} added to {_SETTING}.")
        choices = []
        for vo, registered in sorted((await diracx.config()).registry.items()):
            for group, members in registered.groups.items():
                if (role := await role_of(_member(vo, group, members.properties), diracx)) is not None:
                    # The properties of a group come with it.
                    choices.append(LoginChoice(f"{vo}: {group} ({_MAY[role]})", f"vo:{vo} group:{group}"))
        return LoginOptions(choices)

    async def begin(self, request: Request, choice: str) -> tuple[str, str]:
        """See `LoginProvider`."""
        diracx: DiracxAuthContext = request.state.diracx
        options = await self.options(request)
        if choice not in [each.value for each in options.choices]:
            raise SignInError(options.why_not or "There is no such VO and group to sign in with.")
        verifier = secrets.token_urlsafe(32)
        question = {
            "response_type": "code",
            "client_id": diracx.settings.dirac_client_id,
            "redirect_uri": _redirect_uri(request),
            "scope": choice,
            "state": _state(verifier),
            "code_challenge": _challenge(verifier),
            "code_challenge_method": "S256",
        }
        root = root_of(request).removesuffix(self._below)
        return f"{root}{_path_of(diracx, 'initiate_authorization_flow')}?{urlencode(question)}", verifier

    async def finish(self, request: Request, kept: str) -> str:
        """See `LoginProvider`."""
        diracx: DiracxAuthContext = request.state.diracx
        code, state = (request.query_params.get(name, "") for name in ("code", "state"))
        if not kept or not code or not hmac.compare_digest(state.encode(), _state(kept).encode()):
            raise SignInError("This sign-in was begun in another browser, or too long ago.")
        form = {
            "grant_type": "authorization_code",
            "client_id": diracx.settings.dirac_client_id,
            "redirect_uri": _redirect_uri(request),
            "code": code,
            "code_verifier": kept,
        }
        within = httpx2.ASGITransport(diracx.application, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=within, base_url=_origin(request)) as client:
            answer = await client.post(_path_of(diracx, "get_oidc_token") or "/", data=form)
        if answer.status_code != HTTPStatus.OK:
            raise SignInError(_reason(answer))
        return str(answer.json()["access_token"])


def _member(vo: str, group: str, properties: Iterable[str]) -> AuthorizedUserInfo:
    """Return a user of that group, for the policy to decide about."""
    return AuthorizedUserInfo.model_validate(
        {
            "sub": f"{vo}:",
            "preferred_username": "",
            "vo": vo,
            "dirac_group": group,
            "properties": list(properties),
            "bearer_token": "",
            "token_id": "0" * 32,
        }
    )


def _reason(answer: httpx2.Response) -> str:
    """Return the reason that DiracX gives for a refusal, if users can understand it."""
    logger.warning("DiracX gave no token for a sign-in to the dashboard: %s", answer.status_code)
    try:
        detail = answer.json()["detail"]
    except (ValueError, KeyError, TypeError):
        detail = None
    if answer.is_client_error and isinstance(detail, str):
        return f"DiracX does not let you in: {detail}"
    return "DiracX could not end this sign-in; its log says why."


def _redirect_uri(request: Request) -> str:
    """Return the address that DiracX redirects the browser back to, with the host that the browser uses."""
    return f"{_origin(request)}{root_of(request)}{CALLBACK}"


def _origin(request: Request) -> str:
    return f"{request.url.scheme}://{request.url.netloc}"


def _path_of(diracx: DiracxAuthContext, route: str) -> str | None:
    """Return the path of a route of DiracX in its application; None where its service is switched off."""
    try:
        return str(diracx.application.url_path_for(route))
    except NoMatchFound:
        return None


def _challenge(verifier: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()


def _state(verifier: str) -> str:
    return hmac.new(verifier.encode(), b"diracx tasks dashboard: state", hashlib.sha256).hexdigest()
