"""Sign-in to the dashboard with DiracX's authorization-code flow and PKCE (RFC 6749 4.1, RFC 7636).

During the flow a cookie of the browser has the code verifier, of which challenge and state are one-way functions.
The token endpoint of DiracX is called within this process. The refresh token of its response is discarded.
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

from .backends import LoginOptions, Role, SignInError
from .diracx import DiracxAuthContext, role_of
from .middleware import CALLBACK
from .routes import root_of

logger = logging.getLogger(__name__)

_SETTING = "DIRACX_SERVICE_AUTH_ALLOWED_REDIRECTS"
_PERMISSIONS = {Role.READ: "read-only", Role.WRITE: "read and write"}


class CodeFlow:
    """See `LoginProvider`. The dashboard is mounted at `root_path` of the application."""

    def __init__(self, root_path: str) -> None:
        self._root_path = root_path

    async def options(self, request: Request) -> LoginOptions:
        """See `LoginProvider`. The choices are the groups of all VOs that the access policy allows."""
        diracx: DiracxAuthContext = request.state.diracx
        if _path_of(diracx, "initiate_authorization_flow") is None:
            return LoginOptions()
        if (redirect := _redirect_uri(request)) not in diracx.settings.allowed_redirects:
            return LoginOptions(
                unavailable_reason=f"To sign in without a token, have {redirect} added to {_SETTING}."
            )
        choices = {}
        for vo, registered in sorted((await diracx.config()).registry.items()):
            for group, members in registered.groups.items():
                if (role := await role_of(_member(vo, group, members.properties), diracx)) is not None:
                    choices[f"vo:{vo} group:{group}"] = f"{vo}: {group} ({_PERMISSIONS[role]})"
        return LoginOptions(choices)

    async def begin(self, request: Request, choice: str) -> tuple[str, str]:
        """See `LoginProvider`."""
        diracx: DiracxAuthContext = request.state.diracx
        options = await self.options(request)
        if choice not in options.choices:
            raise SignInError(options.unavailable_reason or "There is no such VO and group to sign in with.")
        verifier = secrets.token_urlsafe(32)
        parameters = {
            "response_type": "code",
            "client_id": diracx.settings.dirac_client_id,
            "redirect_uri": _redirect_uri(request),
            "scope": choice,
            "state": _state(verifier),
            "code_challenge": _challenge(verifier),
            "code_challenge_method": "S256",
        }
        root = root_of(request).removesuffix(self._root_path)
        return f"{root}{_path_of(diracx, 'initiate_authorization_flow')}?{urlencode(parameters)}", verifier

    async def finish(self, request: Request, kept: str) -> str:
        """See `LoginProvider`."""
        diracx: DiracxAuthContext = request.state.diracx
        code, state = (request.query_params.get(name, "") for name in ("code", "state"))
        if not kept or not code or not hmac.compare_digest(state.encode(), _state(kept).encode()):
            raise SignInError("This sign-in was started in another browser, or has expired.")
        form = {
            "grant_type": "authorization_code",
            "client_id": diracx.settings.dirac_client_id,
            "redirect_uri": _redirect_uri(request),
            "code": code,
            "code_verifier": kept,
        }
        transport = httpx2.ASGITransport(diracx.application, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url=_origin(request)) as client:
            response = await client.post(_path_of(diracx, "get_oidc_token") or "/", data=form)
        if response.status_code != HTTPStatus.OK:
            raise SignInError(_reason(response))
        return str(response.json()["access_token"])


def _member(vo: str, group: str, properties: Iterable[str]) -> AuthorizedUserInfo:
    """Make a user of a group, for a check of the access policy."""
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


def _reason(response: httpx2.Response) -> str:
    """Return the reason of DiracX for a refusal, if it is meant for users."""
    logger.warning("DiracX gave no token for a sign-in to the dashboard: %s", response.status_code)
    try:
        detail = response.json()["detail"]
    except (ValueError, KeyError, TypeError):
        detail = None
    if response.is_client_error and isinstance(detail, str):
        return f"DiracX refuses the sign-in: {detail}"
    return "DiracX could not complete this sign-in; its log has the reason."


def _redirect_uri(request: Request) -> str:
    """Return the redirect URI for DiracX, with the host that the browser uses."""
    return f"{_origin(request)}{root_of(request)}{CALLBACK}"


def _origin(request: Request) -> str:
    return f"{request.url.scheme}://{request.url.netloc}"


def _path_of(diracx: DiracxAuthContext, route: str) -> str | None:
    """Return the path of a route of DiracX; None if its service is disabled."""
    try:
        return str(diracx.application.url_path_for(route))
    except NoMatchFound:
        return None


def _challenge(verifier: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()


def _state(verifier: str) -> str:
    return hmac.new(verifier.encode(), b"diracx tasks dashboard: state", hashlib.sha256).hexdigest()
