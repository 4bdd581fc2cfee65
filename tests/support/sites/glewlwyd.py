"""A real identity provider (Glewlwyd) with the client-credentials grant."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sqlite3
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.server_processes import wait_until_it_responds

if TYPE_CHECKING:  # `make servers` asks what is installed, with a Python that has nothing
    import httpx

_SECONDS = 60
_TABLES = Path("/usr/share/dbconfig-common/data/glewlwyd/install/sqlite3")
_MODULES = Path("/usr/lib/glewlwyd")
_SCOPES = ("compute.read", "compute.modify", "compute.create", "compute.cancel")
_CONFIGURATION = """\
port={port}
bind_address="127.0.0.1"
external_url="https://localhost:{port}"
api_prefix="api"
log_mode="console"
log_level="INFO"
session_key="session"
admin_scope="g_admin"
profile_scope="g_profile"
user_module_path="{modules}/user"
client_module_path="{modules}/client"
user_auth_scheme_module_path="{modules}/scheme"
plugin_module_path="{modules}/plugin"
use_secure_connection=true
secure_connection_key_file="{key}"
secure_connection_pem_file="{certificate}"
hash_algorithm="SHA512"
database = {{ type = "sqlite3"; path = "{directory}/glewlwyd.db"; }};
"""


def installed() -> bool:
    """Return whether its modules and its tables are on this host."""
    return _TABLES.exists() and (_MODULES / "plugin/libprotocol_oidc.so").exists()


class Glewlwyd:
    """An identity provider at `issuer`, on loopback; `start` and `stop` may be repeated.

    Args:
        directory: an empty one, for its data.
        port: where it listens.
        certificate: of localhost, with `key`.
        audience: the one for which its tokens may be.
        named_in_tokens: the issuer that its tokens name, if that is another address of it.
    """

    def __init__(
        self,
        directory: Path,
        port: int,
        certificate: Path,
        key: Path,
        audience: str,
        named_in_tokens: str | None = None,
    ) -> None:
        self.issuer = f"https://localhost:{port}/api/oidc"
        self._named = named_in_tokens or self.issuer
        self.directory, self._port, self._audience = directory, port, audience
        self._process: subprocess.Popen[bytes] | None = None
        values = {"port": port, "directory": directory, "certificate": certificate, "key": key}
        (directory / "glewlwyd.conf").write_text(_CONFIGURATION.format(**values, modules=_MODULES))
        with sqlite3.connect(directory / "glewlwyd.db") as database:
            database.executescript(_TABLES.read_text())
        database.close()

    def start(self) -> None:
        """Start it, and return when it listens."""
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                ["glewlwyd", "--config-file", str(self.directory / "glewlwyd.conf")], stdout=log, stderr=log
            )
        wait_until_it_responds(self._process, self._listens, self.directory / "log", _SECONDS)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def set_up(self, *, seconds: int) -> None:
        """Let it give tokens that live so long."""
        with self._administrator() as client:
            for scope in _SCOPES:
                body = {"name": scope, "display_name": scope, "password_required": False, "scheme": {}}
                _done(client.post("scope/", json=body))
            plugin = {"module": "oidc", "name": "oidc", "display_name": "OpenID Connect"}
            _done(client.post("mod/plugin/", json={**plugin, "parameters": self._parameters(seconds)}))

    def set_life(self, seconds: int) -> None:
        """Let tokens live so long from now on."""
        with self._administrator() as client:
            plugin = client.get("mod/plugin/oidc").json()
            plugin["parameters"]["access-token-duration"] = seconds
            _done(client.put("mod/plugin/oidc", json=plugin))
            _done(client.put("mod/plugin/oidc/reset", json={}))

    def keys(self) -> dict[str, Any]:
        """The JWK set by which its tokens are checked."""
        with self._administrator() as client:
            keys: dict[str, Any] = client.get("oidc/jwks").json()
            return keys

    def given(self) -> int:
        """Count the tokens that it has given to clients; at its start it gives one to itself."""
        return len(
            re.findall(r"Access token generated for client '(?!\(null\))", (self.directory / "log").read_text())
        )

    def add_client(self, client_id: str, secret: str) -> None:
        """Make a client known."""
        body = {
            "client_id": client_id,
            "name": client_id,
            "confidential": True,
            "client_secret": secret,
            "password": secret,
            "authorization_type": ["client_credentials"],
            "token_endpoint_auth_method": ["client_secret_basic"],
            "scope": list(_SCOPES),
            "redirect_uri": ["https://localhost/"],
            "enabled": True,
        }
        with self._administrator() as client:
            _done(client.post("client/", json=body))

    @contextlib.contextmanager
    def _administrator(self) -> Iterator[httpx.Client]:
        import httpx

        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        api = f"https://localhost:{self._port}/api/"
        with httpx.Client(base_url=api, verify=context, timeout=_SECONDS) as client:
            _done(client.post("auth/", json={"username": "admin", "password": "password"}))
            yield client

    def _parameters(self, seconds: int) -> dict[str, Any]:
        key = self.directory / "signing.key"
        subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
        public = subprocess.run(
            ["openssl", "rsa", "-in", str(key), "-pubout"], check=True, capture_output=True, text=True
        ).stdout
        off = ("code", "implicit", "password", "refresh", "token", "id-token", "none")
        return {
            "iss": self._named,
            "jwt-type": "rsa",
            "jwt-key-size": "256",
            "key": key.read_text(),
            "cert": public,
            "access-token-duration": seconds,
            "refresh-token-duration": 3600,
            "code-duration": 600,
            "allow-non-oidc": True,
            "auth-type-client-enabled": True,
            **{f"auth-type-{name}-enabled": False for name in off},
            "subject-type": "public",
            "scope": [],
            "additional-parameters": [],
            "claims": [],
            "jwks-show": True,
            "resource-allowed": True,
            "resource-scope": {scope: [self._audience] for scope in _SCOPES},
            "resource-change-allowed": False,
        }


def _done(response: httpx.Response) -> None:
    assert response.status_code == 200, f"{response.request.url}: {response.status_code} {response.text}"
