"""Bearer tokens: from files that others renew, or from an identity provider, fetched and renewed in time.

Everything here may block; back ends call it in a thread.
"""

from __future__ import annotations

import base64
import binascii
import json
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Discriminator, Field, Tag, field_validator

from gubbins.ces.protocol import CESettings
from gubbins.ces.settings import AbsolutePath
from gubbins.domain.exceptions import CEUnavailableError
from gubbins.domain.text import one_line

_MAX_TOKEN_BYTES = 64 * 1024
_FETCH_SECONDS = 20
_RENEW_AT = 2 / 3
"""Part of its life after which a token is renewed."""
_PAUSE_SECONDS = 30
"""Time before a renewal that failed is tried again, while the token still holds."""
_UNKNOWN_LIFE_SECONDS = 300
"""A token is taken to live so long that says nothing of its end."""
_MOST_TOKENS = 1_000

_Text = Annotated[str, Field(min_length=1, max_length=2_000, pattern=r"^[^\x00-\x1f]+$")]


class CredentialsError(CEUnavailableError):
    """Our own credentials are missing, unreadable or expired: the CE was not contacted."""


def read_token(path: Path) -> str:
    """The token in a file.

    Raises:
        CredentialsError: there is none, or it says of itself that it has expired.
    """
    try:
        with path.open("rb") as file:
            token = file.read(_MAX_TOKEN_BYTES + 1).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        words = error.strerror if isinstance(error, OSError) and error.strerror else "it is not text"
        raise CredentialsError(f"cannot read the token in {path}: {words}") from error
    if not token or len(token) > _MAX_TOKEN_BYTES or not token.isprintable() or " " in token:
        raise CredentialsError(f"{path} does not hold a token")
    expires_at = expiry_of_token(token)
    if expires_at is not None and expires_at <= datetime.now(tz=UTC):
        raise CredentialsError(f"{path} has expired at {expires_at:%Y-%m-%d %H:%M:%S} UTC: renew it")
    return token


def expiry_of_token(token: str) -> datetime | None:
    """Expiry time in a JSON web token; only a hint, for the CE verifies the token."""
    try:
        payload = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return datetime.fromtimestamp(claims["exp"], tz=UTC)
    except (IndexError, KeyError, OverflowError, OSError, TypeError, ValueError, binascii.Error):
        return None


class TokenIssuer(CESettings):
    """An identity provider (OpenID Connect) that gives a VO's tokens by the client-credentials grant."""

    issuer: str = Field(description="The provider: https://iam.example.org/, as its tokens name it.")
    client_id: _Text = Field(description="The client that the provider knows.")
    client_secret: AbsolutePath = Field(description="File of its secret, read for each request of a token.")
    scope: _Text = Field(
        default="compute.read compute.modify compute.create compute.cancel",
        description="What the token is to allow, in the terms of the WLCG profile.",
    )
    audience: _Text | None = Field(
        default=None, description="For whom the token is: the compute element, as it names itself."
    )
    ca: AbsolutePath | None = Field(
        default=None, description="File (PEM) of the CAs that the provider may be of; default: the system's."
    )

    @field_validator("issuer")
    @classmethod
    def _https(cls, issuer: str) -> str:
        parts = urlsplit(issuer)
        if parts.scheme != "https" or not parts.hostname or parts.query or parts.fragment or parts.username:
            raise ValueError("must be of the form https://host[:port][/path]")
        return issuer


TokenSource = Annotated[
    Annotated[AbsolutePath, Tag("file")] | Annotated[TokenIssuer, Tag("issuer")],
    # One of both is meant, so that a mistake is told once.
    Discriminator(lambda given: "issuer" if isinstance(given, Mapping | TokenIssuer) else "file"),
]
"""Source of a token: a file, or an identity provider."""


@dataclass(frozen=True, slots=True)
class _Fetched:
    token: str
    renew_at: float  # by time.monotonic, as the other
    ends_at: float


_fetched: dict[TokenIssuer, _Fetched] = {}
_fetching: dict[TokenIssuer, threading.Lock] = {}
_guard = threading.Lock()


def bearer_token(source: Path | TokenIssuer) -> str:
    """The token in a file, or one of an identity provider.

    The latter is kept until two thirds of its life have passed, and renewed by one caller while others use it. A
    provider that is away is noticed when the token has ended.

    Raises:
        CredentialsError: there is none.
    """
    if isinstance(source, Path):
        return read_token(source)
    known = _fetched.get(source)
    if known is not None and time.monotonic() < known.renew_at:
        return known.token
    with _guard:
        if len(_fetching) > _MOST_TOKENS:
            _fetching.clear()
            _fetched.clear()
        lock = _fetching.setdefault(source, threading.Lock())
    usable = known is not None and time.monotonic() < known.ends_at
    if not lock.acquire(blocking=not usable):
        assert known is not None
        return known.token  # another renews it
    try:
        known = _fetched.get(source)
        now = time.monotonic()
        if known is not None and now < known.renew_at:
            return known.token
        try:
            _fetched[source] = _fetch(source)
        except CredentialsError:
            if known is None or now >= known.ends_at:
                raise
            _fetched[source] = _Fetched(known.token, min(now + _PAUSE_SECONDS, known.ends_at), known.ends_at)
        return _fetched[source].token
    finally:
        lock.release()


def _fetch(source: TokenIssuer) -> _Fetched:
    import httpx

    try:
        secret = source.client_secret.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        words = error.strerror if isinstance(error, OSError) and error.strerror else "it is not text"
        raise CredentialsError(f"cannot read the secret in {source.client_secret}: {words}") from error
    before = time.monotonic()
    try:
        context = ssl.create_default_context(cafile=None if source.ca is None else str(source.ca))
        # Nothing is followed or taken from the environment: the secret is for this provider alone.
        with httpx.Client(verify=context, timeout=_FETCH_SECONDS, trust_env=False) as client:
            found = _json(client, "GET", f"{source.issuer.rstrip('/')}/.well-known/openid-configuration")
            endpoint = found.get("token_endpoint")
            if not isinstance(endpoint, str) or urlsplit(endpoint).scheme != "https":
                raise CredentialsError(f"{source.issuer} names no token endpoint (https) of its own")
            form = {"grant_type": "client_credentials", "scope": source.scope}
            if source.audience is not None:
                form |= {"audience": source.audience}
                if "://" in source.audience:
                    form |= {"resource": source.audience}  # RFC 8707: other providers know it by that name
            answer = _json(client, "POST", endpoint, data=form, auth=httpx.BasicAuth(source.client_id, secret))
    except (OSError, ssl.SSLError, httpx.HTTPError, httpx.InvalidURL) as error:
        raise CredentialsError(
            f"{source.issuer} gives no token: {one_line(error) or type(error).__name__}"
        ) from error
    token = answer.get("access_token")
    if (
        not isinstance(token, str)
        or not 0 < len(token) <= _MAX_TOKEN_BYTES
        or not token.isprintable()
        or " " in token
    ):
        raise CredentialsError(f"{source.issuer} answers without a token")
    life = answer.get("expires_in")
    if not isinstance(life, int | float) or not 0 < life < 1e9:
        ends_at = expiry_of_token(token)
        life = _UNKNOWN_LIFE_SECONDS if ends_at is None else (ends_at - datetime.now(tz=UTC)).total_seconds()
    return _Fetched(token, before + _RENEW_AT * life, before + life)


def _json(client: Any, method: str, url: str, **request: Any) -> dict[str, Any]:
    """The answer of the provider, an object.

    Raises:
        CredentialsError: it refuses, or answers with something else. The secret is never in the message.
    """
    with client.stream(method, url, **request) as response:
        body = b""
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > _MAX_TOKEN_BYTES * 2:
                raise CredentialsError(f"{url} answers with more than a token")
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    if response.status_code != 200 or not isinstance(answer, dict):
        said = answer.get("error_description") or answer.get("error") if isinstance(answer, dict) else None
        raise CredentialsError(f"{url} answers {response.status_code}{f': {one_line(said, 200)}' if said else ''}")
    return answer
