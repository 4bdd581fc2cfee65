"""Authentication with access tokens of DiracX and its access policy, for the dashboard in the application."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from diracx.core.config.schema import Config
from diracx.core.settings import AuthSettings
from diracx.routers.utils.users import AuthorizedUserInfo, verify_dirac_access_token
from fastapi import FastAPI, HTTPException, Request

from .access_policies import ActionType
from .backends import LoginProvider, Principal, Role

POLICY = "tasks"


def name_of(user: AuthorizedUserInfo) -> str:
    """Return the unique name of a user for the audit log."""
    return f"{user.preferred_username} ({user.sub})"


@dataclass(frozen=True)
class DiracxAuthContext:
    """Objects of DiracX needed for authentication; `diracx` in the state of a request."""

    application: FastAPI
    settings: AuthSettings
    policy: Callable[..., Awaitable[None]]
    config: Callable[[], Awaitable[Config]]


class DiracxBackend:
    """Uses access tokens of DiracX as sessions; they end when the token expires, or the policy denies access."""

    credential = "DiracX access token"
    takes_links = False
    hint = "`dirac login` gets one; it is the `access_token` in ~/.cache/diracx/credentials.json."

    def __init__(self, provider: LoginProvider) -> None:
        self.provider: LoginProvider | None = provider

    async def sign_in(self, request: Request, credential: str) -> str | None:
        """See `AuthBackend`. The token may be copied with `Bearer` or quotes around it."""
        token = credential.strip().removeprefix("Bearer ").strip().strip('"')
        return token if await self.principal(request, token) is not None else None

    async def principal(self, request: Request, secret: str) -> Principal | None:
        """See `AuthBackend`."""
        diracx: DiracxAuthContext = request.state.diracx
        try:
            user: AuthorizedUserInfo = await verify_dirac_access_token(f"Bearer {secret}", diracx.settings)
        except HTTPException:
            return None
        if (role := await role_of(user, diracx)) is None:
            return None
        sees_all = await _is_allowed(user, diracx, ActionType.READ_ALL)
        return Principal(name_of(user), role, None if sees_all else user.vo)

    async def sign_out(self, secret: str) -> None:
        """See `AuthBackend`. The browser deletes the token, which stays valid."""


async def role_of(user: AuthorizedUserInfo, diracx: DiracxAuthContext) -> Role | None:
    """Return the role that the policy allows a user, if any."""
    for action, role in ((ActionType.WRITE, Role.WRITE), (ActionType.READ, Role.READ)):
        if await _is_allowed(user, diracx, action):
            return role
    return None


async def _is_allowed(user: AuthorizedUserInfo, diracx: DiracxAuthContext, action: ActionType) -> bool:
    try:
        await diracx.policy(POLICY, user, action=action, config=diracx.config)
    except HTTPException:
        return False
    return True
