"""An OpenID provider for tests: discovery, consent page, codes with PKCE, ID tokens."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from .token_issuer import SigningKey

CLIENT_ID = "diracx"

_CONSENT = """<!doctype html><html lang="en"><title>Consent</title><link rel="icon" href="data:,">
<h1>Let DiracX know who you are?</h1>
<form method="post" action="/consent"><input type="hidden" name="asked" value="{asked}">
<button>Allow</button></form>
"""


@functools.cache
def _one_key() -> SigningKey:
    """The key of all providers: making one takes 60 ms of processor time."""
    return SigningKey()


class IdentityProvider:
    """Identity provider on loopback for tests: `subject` is the user who consents, `url` the issuer."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.url = ""
        self._key = _one_key()
        self._asked: dict[str, dict[str, str]] = {}
        self._codes: dict[str, dict[str, str]] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator[IdentityProvider]:
        """Inside the block it responds."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{server.server_port}"
        server.timeout = 0.1
        ended = threading.Event()

        def serve() -> None:
            while not ended.is_set():
                server.handle_request()

        # Unlike `serve_forever`, it ends when a test is interrupted.
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            ended.set()
            thread.join(5)
            server.server_close()

    def document(self, path: str) -> dict[str, Any] | None:
        """Return the document that is published at a path."""
        if path == "/keys":
            return self._key.published
        if path != "/.well-known/openid-configuration":
            return None
        return {
            "issuer": self.url,
            "jwks_uri": f"{self.url}/keys",
            "authorization_endpoint": f"{self.url}/authorize",
            "token_endpoint": f"{self.url}/token",
            "id_token_signing_alg_values_supported": ["RS256"],
        }

    def ask(self, question: dict[str, str]) -> str | None:
        """The consent page; None: no consent is needed."""
        wanted = {"response_type": "code", "client_id": CLIENT_ID, "code_challenge_method": "S256"}
        if not wanted.items() <= question.items() or "openid" not in question.get("scope", "").split():
            return None
        consent = secrets.token_urlsafe()
        self._asked[consent] = question
        return _CONSENT.format(asked=consent)

    def consent(self, form: dict[str, str]) -> str | None:
        """Consent, and return the redirect of the browser with a code."""
        if (question := self._asked.pop(form.get("asked", ""), None)) is None:
            return None
        code = secrets.token_urlsafe()
        self._codes[code] = question
        return f"{question['redirect_uri']}?{urlencode({'code': code, 'state': question['state']})}"

    def token(self, form: dict[str, str]) -> dict[str, Any] | None:
        """The response to a code, the first time that it is brought with its verifier."""
        question = self._codes.pop(form.get("code", ""), {})
        digest = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
        challenge = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        brought = (form.get("client_id"), form.get("redirect_uri"), challenge)
        if brought != tuple(question.get(name) for name in ("client_id", "redirect_uri", "code_challenge")):
            return None
        now = int(time.time())
        claims = {"iss": self.url, "aud": CLIENT_ID, "sub": self.subject, "iat": now, "exp": now + 300}
        return {"access_token": "unused", "token_type": "Bearer", "id_token": self._key.sign(claims)}


def _handler(provider: IdentityProvider) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            if url.path == "/authorize":
                self._respond(provider.ask(dict(parse_qsl(url.query))), "text/html")
            else:
                self._respond(_json(provider.document(url.path)), "application/json")

        def do_POST(self) -> None:
            form = dict(parse_qsl(self.rfile.read(int(self.headers["Content-Length"])).decode()))
            if self.path == "/consent":
                where = provider.consent(form)
                self._respond("" if where else None, "text/plain", where)
            else:
                self._respond(_json(provider.token(form)), "application/json")

        def _respond(self, text: str | None, kind: str, location: str | None = None) -> None:
            body = (text or "").encode()
            self.send_response(400 if text is None else 303 if location else 200)
            if location:
                self.send_header("Location", location)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _json(document: dict[str, Any] | None) -> str | None:
    return None if document is None else json.dumps(document)
