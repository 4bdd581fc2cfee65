"""Who may come in, and what they may do there.

A gate turns a credential into a session, and the session's cookie into a principal. The stand-alone dashboard
has gates of its own; in the DiracX application the gate is DiracX's (`diracx.tasks.web.api.dashboard`).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from starlette.requests import Request

#: A session ends so long after its sign-in, whatever happens in it: a working day.
SESSION_SECONDS = 12 * 3600
#: Sessions of one account: the next one ends the oldest of them, and none of another account.
_SESSIONS = 20


class Role(StrEnum):
    """What a principal may do."""

    READ = "read"
    """Look."""
    WRITE = "write"
    """And act on it."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Whoever sits at the browser."""

    name: str
    """As the audit log has it."""
    role: Role
    vo: str | None
    """Things that belong to a VO are shown only when it is this one; None: those of all VOs, and those of none."""


class Gate(Protocol):
    """Decides who comes in."""

    credential: str
    """What the sign-in page asks for, in a few words."""
    hint: str
    """Where to get it."""
    takes_links: bool
    """Whether a link with the credential in it signs in: logs keep it, so it must be good nowhere else."""

    async def sign_in(self, request: Request, credential: str) -> str | None:
        """The secret of a new session, for its cookie; None when the credential is not good."""

    async def principal(self, request: Request, secret: str) -> Principal | None:
        """Whose session this is; None when it is none, or is over."""

    async def sign_out(self, secret: str) -> None:
        """End the session."""

    provider: Provider | None
    """Where else one gets a credential, by going there and coming back."""


@dataclass(frozen=True, slots=True)
class Choice:
    """As what somebody may sign in."""

    name: str
    value: str
    """What the form sends."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What the sign-in page offers next to the field for a credential."""

    choices: Sequence[Choice] = ()
    why_not: str = ""
    """Why there are none, if somebody can do something about it."""


class SignInError(Exception):
    """Somebody does not come in this way; the message says why, and what to do."""


class Provider(Protocol):
    """An address to which a browser goes with a question, and from which it comes back with the answer."""

    async def offer(self, request: Request) -> Offer:
        """As what one may sign in."""

    async def begin(self, request: Request, choice: str) -> tuple[str, str]:
        """The address to go to, and a secret that only this browser keeps until it is back.

        Raises:
            SignInError: that choice is not offered.
        """

    async def finish(self, request: Request, kept: str) -> str:
        """The credential, for the browser that has come back and kept this (empty: nothing).

        Raises:
            SignInError: it brings no answer to its own question, or the answer is no.
        """


class AccountsError(ValueError):
    """A file of accounts that cannot be used."""


@dataclass(frozen=True, slots=True)
class Account:
    """Somebody who may sign in with a token of their own."""

    name: str
    role: Role
    digest: str
    """SHA-256 of the token, in hexadecimal digits. Tokens are random and long: nobody guesses them from it."""


def new_token() -> str:
    """A token that cannot be guessed (256 bits)."""
    return secrets.token_urlsafe(32)


def digest_of(token: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def form_token(secret: str) -> str:
    """What a form must bring along to be one of ours: other sites cannot know it."""
    return hmac.new(secret.encode(), b"diracx tasks dashboard: form", hashlib.sha256).hexdigest()


def read_accounts(path: Path) -> list[Account]:
    """The accounts in a file: on each line name, role (`read` or `write`) and digest, separated by blanks.

    Raises:
        AccountsError: when the file cannot be read, or a line is wrong.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise AccountsError(f"cannot read {path}: {reason}") from error
    accounts: dict[str, Account] = {}
    for number, line in enumerate(lines, 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        well_formed = len(words) == 3 and words[1] in [*Role] and _is_digest(words[2])
        if not well_formed:
            raise AccountsError(f"{path}:{number}: not a name, `read` or `write`, and 64 hexadecimal digits")
        if words[0] in accounts:
            raise AccountsError(f"{path}:{number}: a second account {words[0]!r}")
        accounts[words[0]] = Account(words[0], Role(words[1]), words[2].lower())
    return list(accounts.values())


def _is_digest(word: str) -> bool:
    return len(word) == 64 and all(character in "0123456789abcdefABCDEF" for character in word)


class TokenGate:
    """The gate of the stand-alone dashboard: each account has its token, sessions live in this process.

    Args:
        accounts: those who may come in.
        hint: where to get a token, for the sign-in page.
    """

    credential = "Token"
    takes_links = True
    provider: Provider | None = None

    def __init__(self, accounts: Iterable[Account], hint: str) -> None:
        self._accounts = list(accounts)
        self.hint = hint
        self._sessions: dict[str, tuple[Principal, float]] = {}

    async def sign_in(self, request: Request, credential: str) -> str | None:
        """See `Gate`."""
        digest = digest_of(credential.strip())
        # All are compared, so that the time it takes tells nothing.
        found = [account for account in self._accounts if hmac.compare_digest(account.digest, digest)]
        if not found:
            return None
        now = time.monotonic()
        principal = Principal(found[0].name, found[0].role, vo=None)
        self._sessions = {key: session for key, session in self._sessions.items() if session[1] > now}
        own = [key for key, session in self._sessions.items() if session[0] == principal]
        for key in own[: max(0, len(own) - _SESSIONS + 1)]:
            del self._sessions[key]
        secret = secrets.token_urlsafe(32)
        self._sessions[digest_of(secret)] = (principal, now + SESSION_SECONDS)
        return secret

    async def principal(self, request: Request, secret: str) -> Principal | None:
        """See `Gate`."""
        principal, ends = self._sessions.get(digest_of(secret), (None, 0.0))
        return principal if ends > time.monotonic() else None

    async def sign_out(self, secret: str) -> None:
        """See `Gate`."""
        self._sessions.pop(digest_of(secret), None)
