"""Bearer tokens, from files that are renewed externally, or from an identity provider with renewal.

All functions may block; back ends call them in a thread.
"""

from __future__ import annotations

import base64
import json
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeGuard
from urllib.parse import urlsplit

from pydantic import Discriminator, Field, Tag, field_validator

from gubbins.ces.protocol import CESettings, NothingDoneError
from gubbins.ces.settings import AbsolutePath
from gubbins.domain.text import one_line

_MAX_TOKEN_BYTES = 64 * 1024
_FETCH_SECONDS = 20
_RENEW_AT = 2 / 3
"""Fraction of its lifetime after which a token is renewed."""
_PAUSE_SECONDS = 30
"""Retry interval of a failed renewal, while the token is valid."""
_DEFAULT_LIFETIME_SECONDS = 300
"""Assumed lifetime of a token without an expiry time."""
_MAX_TOKENS = 1_000

_Text = Annotated[str, Field(min_length=1, max_length=2_000, pattern=r"^[^\x00-\x1f]+$")]


class CredentialsError(NothingDoneError):
    """Our own credentials are missing, unreadable or expired: the CE was not contacted."""


def read_token(path: Path) -> str:
    """Read a token from a file.

    Raises:
        CredentialsError: there is no token, or it has expired.
    """
    token = _read_text(path, "token")
    if not _is_token(token):
        raise CredentialsError(f"{path} does not hold a token")
    expires_at = expiry_of_token(token)
    if expires_at is not None and expires_at <= datetime.now(tz=UTC):
        raise CredentialsError(f"{path} has expired at {expires_at:%Y-%m-%d %H:%M:%S} UTC: renew it")
    return token


def _read_text(path: Path, kind: str) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_TOKEN_BYTES + 1).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not text"
        raise CredentialsError(f"cannot read the {kind} in {path}: {reason}") from error


def _is_token(token: object) -> TypeGuard[str]:
    return (
        isinstance(token, str)
        and 0 < len(token) <= _MAX_TOKEN_BYTES
        and token.isascii()
        and token.isprintable()
        and " " not in token
    )


def expiry_of_token(token: str) -> datetime | None:
    """Read the expiry time of a JSON web token, without verification."""
    try:
        payload = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return datetime.fromtimestamp(claims["exp"], tz=UTC)
    except (IndexError, KeyError, OverflowError, OSError, RecursionError, TypeError, ValueError):
        return None


class TokenIssuer(CESettings):
    """Identity provider (OpenID Connect) that issues tokens by the client-credentials grant."""

    issuer: str = Field(description="URL of the provider, as in its tokens: https://iam.example.org/.")
    client_id: _Text = Field(description="Id of the client.")
    client_secret: AbsolutePath = Field(description="File with the client secret, read for each request.")
    scope: _Text = Field(
        default="compute.read compute.modify compute.create compute.cancel",
        description="Scopes of the token, of the WLCG profile.",
    )
    audience: _Text | None = Field(
        default=None, description="Audience of the token: the name of the compute element."
    )
    ca: AbsolutePath | None = Field(
        default=None, description="File (PEM) with trusted CAs of the provider; default: those of the system."
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
    # So that an error is reported for one of both only.
    Discriminator(lambda value: "issuer" if isinstance(value, Mapping | TokenIssuer) else "file"),
]
"""Source of a token: a file, or an identity provider."""


@dataclass(frozen=True, slots=True)
class _Fetched:
    token: str
    renew_at: float  # time.monotonic()
    ends_at: float  # time.monotonic()


_fetched: dict[TokenIssuer, _Fetched] = {}
_fetching: dict[TokenIssuer, threading.Lock] = {}
_guard = threading.Lock()


def bearer_token(source: Path | TokenIssuer) -> str:
    """Get a token from a file, or a cached one of an identity provider.

    A token is renewed after two thirds of its lifetime by one caller, while others use the old one. An unavailable
    provider is an error only when the token has expired.

    Raises:
        CredentialsError: there is no token.
    """
    if isinstance(source, Path):
        return read_token(source)
    known = _fetched.get(source)
    if known is not None and time.monotonic() < known.renew_at:
        return known.token
    with _guard:
        if len(_fetching) > _MAX_TOKENS:
            _fetching.clear()
            _fetched.clear()
        lock = _fetching.setdefault(source, threading.Lock())
    usable = known is not None and time.monotonic() < known.ends_at
    if not lock.acquire(blocking=not usable):
        assert known is not None
        return known.token  # another caller renews it
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

    secret = _read_text(source.client_secret, "secret")
    before = time.monotonic()
    try:
        context = ssl.create_default_context(cafile=None if source.ca is None else str(source.ca))
        # No redirects and no proxies of the environment: the secret is for this provider only.
        with httpx.Client(verify=context, timeout=_FETCH_SECONDS, trust_env=False) as client:
            found = _json(client, "GET", f"{source.issuer.rstrip('/')}/.well-known/openid-configuration")
            endpoint = found.get("token_endpoint")
            if not isinstance(endpoint, str) or urlsplit(endpoint).scheme != "https":
                raise CredentialsError(f"{source.issuer} names no token endpoint (https) of its own")
            form = {"grant_type": "client_credentials", "scope": source.scope}
            if source.audience is not None:
                form |= {"audience": source.audience}
                if "://" in source.audience:
                    form |= {"resource": source.audience}  # the name in RFC 8707
            document = _json(client, "POST", endpoint, data=form, auth=httpx.BasicAuth(source.client_id, secret))
    except (OSError, ssl.SSLError, httpx.HTTPError, httpx.InvalidURL) as error:
        raise CredentialsError(
            f"{source.issuer} gives no token: {one_line(error) or type(error).__name__}"
        ) from error
    token = document.get("access_token")
    if not _is_token(token):
        raise CredentialsError(f"{source.issuer} returned no token")
    lifetime = document.get("expires_in")
    if not isinstance(lifetime, int | float) or not 0 < lifetime < 1e9:
        ends_at = expiry_of_token(token)
        lifetime = _DEFAULT_LIFETIME_SECONDS
        if ends_at is not None:
            lifetime = (ends_at - datetime.now(tz=UTC)).total_seconds()
    return _Fetched(token, before + _RENEW_AT * lifetime, before + lifetime)


def _json(client: Any, method: str, url: str, **request: Any) -> dict[str, Any]:
    """Request a JSON object from the provider.

    Raises:
        CredentialsError: an error, or another kind of response. The message never contains the secret.
    """
    with client.stream(method, url, **request) as response:
        body = b""
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > _MAX_TOKEN_BYTES * 2:
                raise CredentialsError(f"{url} returned more than a token")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if response.status_code != 200 or not isinstance(document, dict):
        message = (
            document.get("error_description") or document.get("error") if isinstance(document, dict) else None
        )
        raise CredentialsError(
            f"{url} returned {response.status_code}{f': {one_line(message, 200)}' if message else ''}"
        )
    return document
