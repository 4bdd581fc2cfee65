"""The DiracX application: environment, keys, configuration."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HOME = "http://diracx.example.org"
_SYSTEMS = ("AUTH", "CONFIG", "JOBS", "PILOTS", "RSS", "HEALTH", "MY_PILOTS")


def set_environment(monkeypatch: pytest.MonkeyPatch, directory: Path, redis_url: str, config_url: str) -> None:
    """With the routers of the tasks, and no others."""
    from cryptography.fernet import Fernet
    from joserfc.jwk import KeySet, OKPKey
    from uuid_utils import uuid7

    key = OKPKey.generate_key(
        crv="Ed25519", parameters={"key_ops": ["sign", "verify"], "alg": "Ed25519", "kid": uuid7().hex}
    )
    keystore = directory / "keystore.json"
    keystore.write_text(json.dumps(KeySet([key]).as_dict(private=True)))
    environment = {
        "DIRACX_CONFIG_BACKEND_URL": config_url,
        "DIRACX_DB_URL_TASKDB": f"sqlite+aiosqlite:///{directory}/unused.db",
        "DIRACX_TASKS_REDIS_URL": redis_url,
        "DIRACX_SERVICE_AUTH_TOKEN_KEYSTORE": f"file://{keystore}",
        "DIRACX_SERVICE_AUTH_STATE_KEY": Fernet.generate_key().decode(),
        "DIRACX_SERVICE_AUTH_TOKEN_ISSUER": HOME,
        "DIRACX_SERVICE_AUTH_ALLOWED_REDIRECTS": "[]",
        **{f"DIRACX_SERVICE_{name}_ENABLED": "false" for name in _SYSTEMS},
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def make_application() -> Any:
    """The application of that environment."""
    from diracx.core.config import ConfigSource
    from diracx.routers.factory import create_app
    from diracx.tasks.web.api import api, dashboard

    assert {api.__name__, dashboard.__name__}
    app = create_app()
    app.dependency_overrides[ConfigSource.create].__self__.read()  # else the first response is 503
    return app


def with_short_streams(app: Any, seconds: float) -> Any:
    """The application, whose live pages end by themselves after that time."""
    from diracx.tasks.web.api.dashboard import stream_settings
    from diracx.tasks.web.sse import StreamSettings

    short = StreamSettings(max_seconds=seconds, poll_seconds=min(2.0, 1.5 * seconds))
    app.dependency_overrides[stream_settings] = lambda: short
    return app


def token_maker() -> Callable[..., str]:
    """Makes access tokens that the application of this environment accepts."""
    from diracx.core.models import AccessTokenPayload
    from diracx.core.settings import AuthSettings
    from diracx.logic.auth.token import create_token
    from uuid_utils import uuid7

    settings = AuthSettings()

    def make(*properties: str, vo: str = "lhcb", seconds: float = 600) -> str:
        payload: Any = {
            "sub": f"{vo}:nobody",
            "vo": vo,
            "iss": settings.token_issuer,
            "dirac_properties": list(properties),
            "jti": str(uuid7()),
            "preferred_username": "fred",
            "dirac_group": "users",
            "exp": int(time.time() + seconds),
            "dirac_policies": {},
        }
        return create_token(AccessTokenPayload(**payload), settings)

    return make
