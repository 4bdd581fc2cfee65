"""Unusable credentials of the back end `arc` are named with the reason."""

from __future__ import annotations

import base64
import contextlib
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from gubbins.ces.arc import ArcSettings
from gubbins.ces.arc.credentials import CredentialsError, read_identity
from gubbins.ces.transports.tokens import expiry_of_token


def arc_settings(**files: Any) -> ArcSettings:
    return ArcSettings(url="https://ce.example.org/arex", default_script="true", **files)


def write_certificate(path: Path, *, expires: timedelta, password: bytes | None = None) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "pilot")])
    begin = datetime.now(tz=UTC) - timedelta(days=2)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(begin)
        .not_valid_after(datetime.now(tz=UTC) + expires)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    lock = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, lock)
    path.write_bytes(certificate.public_bytes(pem) + secret)


def test_unusable_credentials_are_named_with_the_reason(tmp_path: Path) -> None:
    proxy = tmp_path / "proxy.pem"
    with_proxy = arc_settings(certificate=str(proxy))
    with pytest.raises(CredentialsError, match=r"proxy\.pem: No such file"):
        read_identity(with_proxy)
    proxy.write_text("invalid")
    with pytest.raises(CredentialsError, match=r"cannot use the certificate .*proxy\.pem"):
        read_identity(with_proxy)
    write_certificate(proxy, expires=timedelta(days=-1))
    with pytest.raises(CredentialsError, match=r"proxy\.pem has expired at \d{4}-.* UTC: renew it"):
        read_identity(with_proxy)
    write_certificate(proxy, expires=timedelta(days=1), password=b"secret")
    with pytest.raises(CredentialsError, match=r"cannot use the certificate .*proxy\.pem"):
        read_identity(with_proxy)
    write_certificate(proxy, expires=timedelta(days=1))
    assert read_identity(with_proxy).token is None
    (tmp_path / "ca").write_text("invalid")
    with pytest.raises(CredentialsError, match="cannot read the CA certificates"):
        read_identity(arc_settings(certificate=str(proxy), ca=str(tmp_path / "ca")))


@pytest.mark.parametrize("content", [b"", b"two words", b"a\nb", b"\xff", b"x" * 70_000])
def test_a_file_without_a_token_is_not_sent(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(CredentialsError, match="token"):
        read_identity(arc_settings(token=str(tmp_path / "token")))


def test_a_ca_that_violates_rfc_5280_is_trusted_by_every_python(tmp_path: Path) -> None:
    """Such are CAs of grids, which know no key identifiers; Python 3.13 began to refuse them."""
    key = ec.generate_private_key(ec.SECP256R1())
    ca, host = (x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in ("CA", "localhost"))
    now = datetime.now(tz=UTC)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
    parts = []
    for subject, extension in ((ca, x509.BasicConstraints(ca=True, path_length=None)), (host, names)):
        certificate = x509.CertificateBuilder(
            ca, subject, key.public_key(), len(parts) + 1, now, now + timedelta(1)
        )
        signed = certificate.add_extension(extension, critical=False).sign(key, hashes.SHA256())
        parts.append(signed.public_bytes(serialization.Encoding.PEM))
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "ca.pem").write_bytes(parts[0])
    (tmp_path / "host.pem").write_bytes(parts[1] + secret)
    (tmp_path / "token").write_text("x")
    client = read_identity(arc_settings(token=str(tmp_path / "token"), ca=str(tmp_path / "ca.pem"))).context
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "host.pem")
    assert handshake(client, server) == "TLSv1.3"


def handshake(client: ssl.SSLContext, server: ssl.SSLContext) -> str | None:
    """The protocol that both have agreed upon."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server, server_hostname="localhost"),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    for _ in range(4):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return ends[0].version()


@pytest.mark.parametrize("claims", ["[" * 9000, "{", "[]", "{}", '{"exp": "x"}', '{"exp": 1e99}'])
def test_a_token_without_a_readable_expiry_time_may_be_valid(claims: str) -> None:
    assert expiry_of_token(f"x.{base64.urlsafe_b64encode(claims.encode()).decode()}.x") is None
