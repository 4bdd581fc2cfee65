"""The gate of the dashboard in the DiracX application: its tokens, and what the access policy makes of them."""

from __future__ import annotations

__all__ = ["POLICY", "DiracxDoor", "DiracxGate", "role_of"]

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from diracx.core.config.schema import Config
from diracx.core.settings import AuthSettings
from diracx.routers.utils.users import AuthorizedUserInfo, verify_dirac_access_token
from fastapi import FastAPI, HTTPException, Request

from ..api.audit_logger import name_of
from .access_policies import ActionType
from .backends import Principal, Provider, Role

POLICY = "tasks"


@dataclass(frozen=True)
class DiracxDoor:
    """What DiracX decides by; `door` in the state of a request."""

    application: FastAPI
    settings: AuthSettings
    policy: Callable[..., Awaitable[None]]
    config: Callable[[], Awaitable[Config]]


class DiracxGate:
    """Sessions that are access tokens of DiracX: as long as a token is good, and as far as the policy lets it.

    Args:
        provider: where else one gets a token.
    """

    credential = "DiracX access token"
    takes_links = False
    hint = "`dirac login` gets one; it is the `access_token` in ~/.cache/diracx/credentials.json."

    def __init__(self, provider: Provider) -> None:
        self.provider: Provider | None = provider

    async def sign_in(self, request: Request, credential: str) -> str | None:
        """See `Gate`. Forms may bring it as it is copied, with `Bearer` or quotes around it."""
        token = credential.strip().removeprefix("Bearer ").strip().strip('"')
        return token if await self.principal(request, token) is not None else None

    async def principal(self, request: Request, secret: str) -> Principal | None:
        """See `Gate`."""
        door: DiracxDoor = request.state.door
        try:
            user: AuthorizedUserInfo = await verify_dirac_access_token(f"Bearer {secret}", door.settings)
        except HTTPException:
            return None
        if (role := await role_of(user, door)) is None:
            return None
        sees_all = await _is_allowed(user, door, ActionType.READ_ALL)
        return Principal(name_of(user), role, None if sees_all else user.vo)

    async def sign_out(self, secret: str) -> None:
        """See `Gate`. The token stays good elsewhere; the browser forgets it."""


async def role_of(user: AuthorizedUserInfo, door: DiracxDoor) -> Role | None:
    """What the policy lets a user do, if anything."""
    for action, role in ((ActionType.WRITE, Role.WRITE), (ActionType.READ, Role.READ)):
        if await _is_allowed(user, door, action):
            return role
    return None


async def _is_allowed(user: AuthorizedUserInfo, door: DiracxDoor, action: ActionType) -> bool:
    try:
        await door.policy(POLICY, user, action=action, config=door.config)
    except HTTPException:
        return False
    return True
