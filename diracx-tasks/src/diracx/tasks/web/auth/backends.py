"""Authentication back ends: they turn a credential into a session, and its cookie into a principal.

The stand-alone dashboard has `TokenBackend`; in the DiracX application it is `DiracxBackend` of
`diracx.tasks.web.auth.diracx`.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from starlette.requests import Request

#: A session ends so long after its sign-in, whatever happens in it: a working day.
SESSION_SECONDS = 12 * 3600


class Role(StrEnum):
    """Role of a principal."""

    READ = "read"
    """Look."""
    WRITE = "write"
    """Look and act."""


@dataclass(frozen=True, slots=True)
class Principal:
    """The user of a session."""

    name: str
    """As the audit log has it."""
    role: Role
    vo: str | None
    """Things that belong to a VO are shown only when it is this one; None: those of all VOs, and those of none."""


class AuthBackend(Protocol):
    """Decides who may sign in."""

    credential: str
    """Name of the credential that the sign-in page asks for, in a few words."""
    hint: str
    """Hint where to get it."""
    takes_links: bool
    """True if a link with the credential in it signs in: logs keep it, so it must be good nowhere else."""

    async def sign_in(self, request: Request, credential: str) -> str | None:
        """Begin a session. Returns its secret, for the cookie; None when the credential is not valid."""

    async def principal(self, request: Request, secret: str) -> Principal | None:
        """Return the user of a session; None when it does not exist or is over."""

    async def sign_out(self, secret: str) -> None:
        """End the session."""

    provider: LoginProvider | None
    """Provider that gives users a credential by a redirect there and back."""


@dataclass(frozen=True, slots=True)
class LoginChoice:
    """One role that a user may sign in with."""

    name: str
    value: str
    """Value that the form sends."""


@dataclass(frozen=True, slots=True)
class LoginOptions:
    """Options of the sign-in page beside the field for a credential."""

    choices: Sequence[LoginChoice] = ()
    why_not: str = ""
    """Reason why there are none, if that can be changed."""


class SignInError(Exception):
    """A sign-in is refused; the message says why, and what to do."""


class LoginProvider(Protocol):
    """Signs users in by a redirect to an identity provider and back."""

    async def options(self, request: Request) -> LoginOptions:
        """List the roles that users may sign in with."""

    async def begin(self, request: Request, choice: str) -> tuple[str, str]:
        """Return the address to redirect to, and a secret that the browser keeps until it is back.

        Raises:
            SignInError: that choice is not offered.
        """

    async def finish(self, request: Request, kept: str) -> str:
        """Return the credential of a browser that is back and kept this secret (empty: none).

        Raises:
            SignInError: the answer does not belong to the secret, or is a refusal.
        """


def new_token() -> str:
    """Return a random token of 256 bits."""
    return secrets.token_urlsafe(32)


def form_token(secret: str) -> str:
    """Return the token that forms of a session carry, against cross-site request forgery."""
    return hmac.new(secret.encode(), b"diracx tasks dashboard: form", hashlib.sha256).hexdigest()


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


class TokenBackend:
    """Signs in with a token, for the stand-alone dashboard; sessions live in this process.

    Args:
        tokens: the principal of each token.
        hint: where to get a token, for the sign-in page.
        max_sessions: of one principal: the next one ends the oldest of them, and none of another principal.
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
        # All are compared, so that the time it takes tells nothing.
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
