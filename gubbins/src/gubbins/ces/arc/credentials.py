"""Credentials for an ARC CE: a certificate, a proxy or a token, in files that others renew.

Everything here reads files and may take some milliseconds; the back end calls it in a thread.
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from gubbins.ces.transports.tokens import CredentialsError, TokenIssuer, bearer_token, expiry_of_token
from gubbins.domain.text import one_line

from .settings import ArcSettings


@dataclass(frozen=True, slots=True)
class Identity:
    """TLS context and token that requests are made with."""

    context: ssl.SSLContext
    token: str | None
    expires_at: datetime | None  # None: it does not say


def fingerprint(settings: ArcSettings) -> tuple[object, ...]:
    """A value that changes as soon as one of the files is replaced or written to, or the token is renewed.

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
        CredentialsError: one of them is missing or of no use, or what it holds has expired.
    """
    context = _trust(settings.ca)
    if settings.certificate is not None:
        expires_at: datetime | None = _load_certificate(context, settings.certificate, settings.key)
        token = None
        path: Path | str = settings.certificate
    else:
        assert settings.token is not None
        path = settings.token if isinstance(settings.token, Path) else settings.token.issuer
        token = bearer_token(settings.token)
        expires_at = expiry_of_token(token)
    if expires_at is not None and expires_at <= datetime.now(tz=UTC):
        raise CredentialsError(f"{path} has expired at {expires_at:%Y-%m-%d %H:%M:%S} UTC: renew it")
    return Identity(context, token, expires_at)


def _trust(ca: Path | None) -> ssl.SSLContext:
    try:
        if ca is None:
            context = ssl.create_default_context()
        elif ca.is_dir():
            context = ssl.create_default_context(capath=str(ca))
        else:
            context = ssl.create_default_context(cafile=str(ca))
    except (OSError, ssl.SSLError) as error:
        raise CredentialsError(f"cannot read the CA certificates in {ca}: {_words(error)}") from error
    # Python 3.13 began to ask for all that RFC 5280 wants, which CAs of grids do not have.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def _load_certificate(context: ssl.SSLContext, certificate: Path, key: Path | None) -> datetime:
    """Returns when the first of the chain expires."""
    try:
        chain = x509.load_pem_x509_certificates(certificate.read_bytes())
        # Without an answer to the question for a password, OpenSSL would ask at the terminal.
        context.load_cert_chain(certificate, key, password=lambda: b"")
    except (OSError, ssl.SSLError, ValueError) as error:
        which = f"{certificate} with the key in {key}" if key is not None else str(certificate)
        raise CredentialsError(f"cannot use the certificate {which}: {_words(error)}") from error
    return min(each.not_valid_after_utc for each in _presented(chain))


def _presented(chain: Sequence[x509.Certificate]) -> Sequence[x509.Certificate]:
    """The certificate and its issuers, as far as they follow each other; what else a file holds is not used."""
    used = [chain[0]]
    for each in chain[1:]:
        if each.subject == used[-1].issuer:
            used.append(each)
    return used


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and not isinstance(error, ssl.SSLError):
        return error.strerror
    return one_line(error)
