"""Credentials for an ARC CE: a certificate, a proxy or a token, in files that are renewed externally.

All functions read files; the back end calls them in a thread.
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from cryptography import x509

from gubbins.ces.transports.tokens import CredentialsError, TokenIssuer, bearer_token
from gubbins.domain.text import one_line

from .settings import ArcSettings


class Identity(NamedTuple):
    """TLS context and token of requests."""

    context: ssl.SSLContext
    token: str | None


def fingerprint(settings: ArcSettings) -> tuple[object, ...]:
    """Compute a value that changes when one of the files or the token is replaced.

    Raises:
        CredentialsError: the identity provider gives no token.
    """
    marks: list[object] = []
    for path in (settings.certificate, settings.key, settings.token, settings.ca):
        try:
            found = path.stat() if isinstance(path, Path) else None
        except OSError:
            found = None
        marks.append(found and (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))
    if isinstance(settings.token, TokenIssuer):
        marks.append(bearer_token(settings.token))
    return tuple(marks)


def read_identity(settings: ArcSettings) -> Identity:
    """Read the files.

    Raises:
        CredentialsError: one of them is missing, invalid or expired.
    """
    context = _trust(settings.ca)
    if (path := settings.certificate) is None:
        assert settings.token is not None
        return Identity(context, bearer_token(settings.token))
    expires_at = _load_certificate(context, path, settings.key)
    if expires_at <= datetime.now(tz=UTC):
        raise CredentialsError(f"{path} has expired at {expires_at:%Y-%m-%d %H:%M:%S} UTC: renew it")
    return Identity(context, None)


def _trust(ca: Path | None) -> ssl.SSLContext:
    try:
        if ca is None:
            context = ssl.create_default_context()
        elif ca.is_dir():
            context = ssl.create_default_context(capath=str(ca))
        else:
            context = ssl.create_default_context(cafile=str(ca))
    except (OSError, ssl.SSLError) as error:
        raise CredentialsError(f"cannot read the CA certificates in {ca}: {_error_text(error)}") from error
    # Grid CAs do not comply with RFC 5280, which Python 3.13 enforces by default.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def _load_certificate(context: ssl.SSLContext, certificate: Path, key: Path | None) -> datetime:
    """Load a certificate, and return the earliest expiry time of its chain."""
    try:
        chain = x509.load_pem_x509_certificates(certificate.read_bytes())
        # An empty password, since OpenSSL would ask for one at the terminal.
        context.load_cert_chain(certificate, key, password=lambda: b"")
    except (OSError, ssl.SSLError, ValueError) as error:
        which = f"{certificate} with the key in {key}" if key is not None else str(certificate)
        raise CredentialsError(f"cannot use the certificate {which}: {_error_text(error)}") from error
    return min(each.not_valid_after_utc for each in _presented(chain))


def _presented(chain: Sequence[x509.Certificate]) -> Sequence[x509.Certificate]:
    """The certificate and its chain of issuers, without other certificates of the file."""
    used = [chain[0]]
    for each in chain[1:]:
        if each.subject == used[-1].issuer:
            used.append(each)
    return used


def _error_text(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and not isinstance(error, ssl.SSLError):
        return error.strerror
    return one_line(error)
