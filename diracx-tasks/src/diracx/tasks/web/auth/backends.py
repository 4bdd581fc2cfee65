"""Authentication back ends: make a session from a credential, and a principal from the session cookie.

The stand-alone dashboard uses `TokenBackend`, the DiracX application `diracx.tasks.web.auth.diracx.DiracxBackend`.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from starlette.requests import Request

#: Lifetime of a session from its sign-in.
SESSION_SECONDS = 12 * 3600


class Role(StrEnum):
    """Role of a principal."""

    READ = "read"
    """May read."""
    WRITE = "write"
    """May read and perform actions."""


@dataclass(frozen=True, slots=True)
class Principal:
    """The user of a session."""

    name: str
    """Name in the audit log."""
    role: Role
    vo: str | None
    """The VO whose data are visible; None: those of all VOs, and those of none."""


class AuthBackend(Protocol):
    """Authentication back end of the dashboard."""

    credential: str
    """Name of the credential for the sign-in page."""
    hint: str
    """Hint on the sign-in page: where to get the credential."""
    takes_links: bool
    """Accept the credential in a URL. Logs may keep URLs: it must be valid for this dashboard alone."""

    async def sign_in(self, request: Request, credential: str) -> str | None:
        """Start a session. Returns its secret for the cookie; None if the credential is invalid."""

    async def principal(self, request: Request, secret: str) -> Principal | None:
        """Return the user of a session; None if it does not exist or has expired."""

    async def sign_out(self, secret: str) -> None:
        """End the session."""

    provider: LoginProvider | None
    """Identity provider, if sign-in by redirect is supported."""


@dataclass(frozen=True, slots=True)
class LoginOptions:
    """Options of the sign-in page in addition to the credential field."""

    choices: Mapping[str, str] = field(default_factory=dict)
    """Value of the form field -> name of a role with which the user may sign in."""
    unavailable_reason: str = ""
    """Reason why there are no choices, if an administrator can change that."""


class SignInError(Exception):
    """The sign-in was refused; the message has reason and remedy for the user."""


class LoginProvider(Protocol):
    """Signs users in by a redirect to an identity provider and back."""

    async def options(self, request: Request) -> LoginOptions:
        """Return the roles with which users may sign in."""

    async def begin(self, request: Request, choice: str) -> tuple[str, str]:
        """Return the URL to redirect to, and a secret that the browser keeps until it returns.

        Raises:
            SignInError: the choice does not exist.
        """

    async def finish(self, request: Request, kept: str) -> str:
        """Return the credential of a browser that returns with this secret; empty: it has none.

        Raises:
            SignInError: the response does not match the secret, or is a refusal.
        """


def new_token() -> str:
    """Return a random token of 256 bits."""
    return secrets.token_urlsafe(32)


def form_token(secret: str) -> str:
    """Return the CSRF token of the forms of a session."""
    return hmac.new(secret.encode(), b"diracx tasks dashboard: form", hashlib.sha256).hexdigest()


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


class TokenBackend:
    """Signs in with a token, for the stand-alone dashboard. Keeps sessions in memory.

    Args:
        tokens: the principal of each token.
        hint: where to get a token, for the sign-in page.
        max_sessions: sessions of one principal; a further sign-in ends its oldest one.
    """

    credential = "Token"
    takes_links = True
    provider: LoginProvider | None = None

    def __init__(self, tokens: Mapping[str, Principal], hint: str, max_sessions: int = 20) -> None:
        self._principals = [(_digest(token), principal) for token, principal in tokens.items()]
        self.hint = hint
        self._max_sessions = max_sessions
        self._sessions: dict[str, tuple[Principal, float]] = {}

    async def sign_in(self, request: Request, credential: str) -> str | None:
        """See `AuthBackend`."""
        given = _digest(credential.strip())
        # All are compared, so that the time does not depend on the token.
        found = [principal for digest, principal in self._principals if hmac.compare_digest(digest, given)]
        if not found:
            return None
        [principal], now = found, time.monotonic()
        self._sessions = {key: session for key, session in self._sessions.items() if session[1] > now}
        own = [key for key, session in self._sessions.items() if session[0] == principal]
        for key in own[: max(0, len(own) - self._max_sessions + 1)]:
            del self._sessions[key]
        secret = new_token()
        self._sessions[_digest(secret)] = (principal, now + SESSION_SECONDS)
        return secret

    async def principal(self, request: Request, secret: str) -> Principal | None:
        """See `AuthBackend`."""
        principal, ends = self._sessions.get(_digest(secret), (None, 0.0))
        return principal if ends > time.monotonic() else None

    async def sign_out(self, secret: str) -> None:
        """See `AuthBackend`."""
        self._sessions.pop(_digest(secret), None)
