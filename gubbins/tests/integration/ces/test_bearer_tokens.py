"""Tokens of a real identity provider: fetch, renewal and outages."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import servers
from diracx.tasks.testing.server import free_port
from pydantic import ValidationError
from support.sites.glewlwyd import Glewlwyd

from gubbins.ces.transports.tokens import CredentialsError, TokenIssuer, bearer_token

SECRET, AUDIENCE = "a-secret-word", "https://ce.example.org:8443"


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Glewlwyd]:
    if (obstacle := servers.obstacle("Glewlwyd")) is not None:
        pytest.skip(obstacle)
    directory = tmp_path_factory.mktemp("glewlwyd")
    certificate, key = directory / "ca.pem", directory / "ca.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"),
            *("-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    site = Glewlwyd(directory, free_port(), certificate, key, AUDIENCE)
    site.start()
    try:
        site.set_up(seconds=600)
        yield site
    finally:
        site.stop()


@pytest.fixture
def source(provider: Glewlwyd, tmp_path: Path) -> Callable[..., TokenIssuer]:
    """A client of its own for each test, so that no token is known already."""
    name = tmp_path.name
    provider.add_client(name, SECRET)
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    ca = Path(provider.directory / "ca.pem")
    given: dict[str, Any] = {"issuer": provider.issuer, "client_id": name, "client_secret": tmp_path / "secret"}
    return lambda **other: TokenIssuer(**(given | {"ca": ca, "audience": AUDIENCE} | other))


def claims_of(token: str) -> dict[str, Any]:
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
    return claims


async def test_a_token_is_fetched_once_for_its_audience_and_scopes(
    provider: Glewlwyd, source: Callable[..., TokenIssuer]
) -> None:
    before = provider.given()
    tokens = await asyncio.gather(*(asyncio.to_thread(bearer_token, source()) for _ in range(20)))
    assert len(set(tokens)) == 1
    assert provider.given() == before + 1
    claims = claims_of(tokens[0])
    assert (claims["iss"], claims["aud"]) == (provider.issuer, AUDIENCE)
    assert set(claims["scope"].split()) == {f"compute.{what}" for what in ("read", "modify", "create", "cancel")}
    assert claims_of(bearer_token(source(scope="compute.read")))["scope"] == "compute.read"


async def test_a_token_is_renewed_before_it_expires_and_used_while_the_provider_is_unavailable(
    provider: Glewlwyd, source: Callable[..., TokenIssuer]
) -> None:
    provider.set_life(6)
    try:
        first = bearer_token(source())
        begun = time.monotonic()
        while (second := bearer_token(source())) == first:
            assert time.monotonic() - begun < 6, "it is renewed before it ends"
            await asyncio.sleep(0.05)
        assert time.monotonic() - begun > 3
        provider.stop()
        begun = time.monotonic()
        while time.monotonic() - begun < 5:
            assert bearer_token(source()) == second, "it still holds"
            await asyncio.sleep(0.05)
        while time.monotonic() - begun < 7:  # it has ended then
            await asyncio.sleep(0.05)
        with pytest.raises(CredentialsError, match="gives no token"):
            bearer_token(source())
        provider.start()
        assert bearer_token(source()) not in {first, second}
    finally:
        provider.stop()
        provider.start()
        provider.set_life(600)


def test_errors_of_an_identity_provider_do_not_contain_the_secret(
    provider: Glewlwyd, source: Callable[..., TokenIssuer], tmp_path: Path
) -> None:
    (tmp_path / "other").write_text("another-word")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"client_secret": tmp_path / "other"}, "/token returned 40"),
        ({"client_id": "nobody"}, "/token returned 40"),
        ({"scope": "storage.modify:/"}, "/token returned 40"),
        ({"client_secret": tmp_path / "none"}, "cannot read the secret in .*none: No such file"),
        ({"issuer": provider.issuer + "x"}, "openid-configuration returned 404"),
        ({"issuer": f"https://localhost:{free_port()}"}, "gives no token"),
        ({"ca": None}, "gives no token.*certificate"),
        ({"ca": tmp_path / "none"}, "gives no token.*No such file"),
    ]
    for change, message in cases:
        with pytest.raises(CredentialsError, match=message) as caught:
            bearer_token(source(**change))
        assert "word" not in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"issuer": "http://localhost"},
        {"issuer": "https://user:pw@localhost"},
        {"issuer": "nowhere"},
        {"client_secret": "not/absolute"},
        {"scope": ""},
        {"scope": "a\nb"},
        {"secret": "in the file of compute elements"},
    ],
    ids=str,
)
def test_settings_that_would_leak_or_fail_are_refused(wrong: dict[str, str]) -> None:
    good = {"issuer": "https://localhost/", "client_id": "a", "client_secret": "/etc/secret"}
    TokenIssuer.model_validate(good)
    with pytest.raises(ValidationError):
        TokenIssuer.model_validate(good | wrong)
