"""An issuer of bearer tokens for tests, which publishes its key as OpenID providers do."""

from __future__ import annotations

import base64
import contextlib
import json
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa


class SigningKey:
    """An RSA key that signs tokens."""

    def __init__(self) -> None:
        self._key = rsa.generate_private_key(65537, 2048)

    def sign(self, claims: dict[str, Any]) -> str:
        """A JWT with these claims."""
        signed = f"{_encode({'alg': 'RS256', 'kid': '1', 'typ': 'JWT'})}.{_encode(claims)}"
        return f"{signed}.{_base64(self._key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256()))}"

    @property
    def published(self) -> dict[str, Any]:
        """JWK set by which services check its tokens."""
        numbers = self._key.public_key().public_numbers()
        public = {"n": _base64(numbers.n.to_bytes(256, "big")), "e": _base64(numbers.e.to_bytes(3, "big"))}
        return {"keys": [{"kty": "RSA", "kid": "1", "use": "sig", "alg": "RS256", **public}]}


class TokenIssuer:
    """Makes tokens; while it is `running`, its keys can be fetched from `url`."""

    def __init__(self, port: int, certificate: Path, key: Path) -> None:
        self.url = f"https://localhost:{port}"
        self._port = port
        self._files = (certificate, key)
        self._key = SigningKey()

    def make_token(self, *, subject: str = "pilot", seconds: float = 3600) -> str:
        """A token that expires in so many seconds; or so many seconds ago, if they are negative."""
        now = int(time.time())
        claims = {
            "iss": self.url,
            "sub": subject,
            "aud": "https://wlcg.cern.ch/jwt/v1/any",
            "iat": now - 10_000,
            "nbf": now - 10_000,
            "exp": int(now + seconds),
            "scope": "compute.create compute.read compute.cancel compute.modify",
            "wlcg.ver": "1.0",
        }
        return self._key.sign(claims)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside the block its keys can be fetched."""
        documents: dict[str, Any] = {
            "/.well-known/openid-configuration": {"issuer": self.url, "jwks_uri": f"{self.url}/keys"},
            "/keys": self._key.published,
        }
        with published(self._port, *self._files, documents):
            yield


@contextlib.contextmanager
def published(port: int, certificate: Path, key: Path, documents: dict[str, Any]) -> Iterator[None]:
    """Inside the block these documents (path -> JSON) can be fetched from localhost by HTTPS."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            # A-REX asks for the whole URL, as one asks a proxy.
            document = documents.get(urlsplit(self.path).path)
            body = json.dumps(document).encode()
            self.send_response(404 if document is None else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _encode(document: dict[str, Any]) -> str:
    return _base64(json.dumps(document).encode())


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
