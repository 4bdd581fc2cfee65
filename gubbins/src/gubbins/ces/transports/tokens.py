"""Read tokens from files that others renew."""

from __future__ import annotations

import base64
import binascii
import json
from datetime import UTC, datetime
from pathlib import Path

from gubbins.domain.exceptions import CEUnavailableError

_MAX_TOKEN_BYTES = 64 * 1024


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
