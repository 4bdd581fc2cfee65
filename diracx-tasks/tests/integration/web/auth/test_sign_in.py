"""Sign-in to the dashboard of the DiracX application at an identity provider."""

from __future__ import annotations

import base64
import json
import logging
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from support.dashboard_sign_in import BELOW, CALLBACK, SETTING, Browser, application, onward
from support.diracx_application import HOME

OPERATOR, ADMIN = "vo:lhcb group:operators", "vo:gridpp group:admins"


@pytest.fixture
async def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, redis_url: str) -> AsyncIterator[Any]:
    async with application(monkeypatch, tmp_path, redis_url, [HOME + CALLBACK]) as made:
        yield made


@pytest.fixture
async def browser(app: Any) -> AsyncIterator[Browser]:
    async with Browser(app) as made:
        yield made


def session(browser: Browser) -> str | None:
    return browser.client.cookies.get("tasks-dashboard-http")


def cookies_of(response: httpx.Response) -> dict[str, str]:
    """Name -> everything else, in lower case."""
    pairs = (line.lower().partition("=") for line in response.headers.get_list("set-cookie"))
    return {name: rest for name, _, rest in pairs}


@pytest.mark.parametrize(("choice", "may"), [(OPERATOR, "read-only<"), (ADMIN, "read and write<")])
async def test_a_user_who_consents_is_signed_in_with_the_chosen_vo_and_group(
    browser: Browser, choice: str, may: str
) -> None:
    last = await browser.sign_in(choice, "/queues?x=%26y")
    assert last.status_code == 200
    assert onward(last) == f"{BELOW}/queues?x=%26y"
    page = await browser.client.get(onward(last))
    assert page.status_code == 200
    vo = choice.split(maxsplit=1)[0].removeprefix("vo:")
    assert f"fred ({vo}:" in page.text
    assert may in page.text


async def test_groups_that_the_policy_lets_in_are_offered_and_no_others(browser: Browser) -> None:
    page = (await browser.get("/sign-in?next=/locks")).text
    offered = re.findall(r'<option value="([^"]+)">([^<]+)<', page)
    assert offered == [
        (f"vo:{vo} group:{group}", f"{vo}: {group} ({may})")
        for vo in ("gridpp", "lhcb")
        for group, may in (("operators", "read-only"), ("admins", "read and write"))
    ]
    for choice in ("vo:lhcb group:users", "vo:lhcb", "", "vo:lhcb group:operators property:JobAdministrator"):
        response = await browser.start(choice)
        assert response.status_code == 403
        assert "There is no such VO and group" in response.text
        assert "set-cookie" not in response.headers


async def test_a_user_outside_the_group_is_refused_with_the_reason(browser: Browser) -> None:
    last = await browser.sign_in("vo:lhcb group:admins")
    assert last.status_code == 403
    assert "User is not a member of the requested group (fred, admins)" in last.text
    assert session(browser) is None


async def test_a_foreign_address_cannot_sign_a_user_in(app: Any, browser: Browser) -> None:
    async with Browser(app) as attacker:
        address = await attacker.consent(await attacker.start(ADMIN))
    for begun in (False, True):  # whether the victim is about to sign in as well
        if begun:
            await browser.start(OPERATOR)
        response = await browser.client.get(address)
        assert response.status_code == 403
        assert "started in another browser" in response.text
        assert session(browser) is None


@pytest.mark.parametrize("state", ["", "x", "é", None])
async def test_a_wrong_state_is_refused_and_ends_the_sign_in(browser: Browser, state: str | None) -> None:
    address = await browser.consent(await browser.start(OPERATOR))
    code = parse_qs(urlsplit(address).query)["code"][0]
    wrong = {"code": code} | ({} if state is None else {"state": state})
    assert (await browser.client.get(CALLBACK, params=wrong)).status_code == 403
    assert (await browser.client.get(address)).status_code == 403
    assert session(browser) is None


async def test_an_authorization_code_is_valid_once(browser: Browser) -> None:
    started = await browser.start(OPERATOR)
    kept = dict(browser.client.cookies)
    address = await browser.consent(started)
    assert (await browser.client.get(address)).status_code == 200
    assert (await browser.client.get(address)).status_code == 403
    replayed = await browser.client.get(
        address, headers={"cookie": "; ".join(f"{name}={value}" for name, value in kept.items())}
    )
    assert replayed.status_code == 403
    assert "Code was already used" in replayed.text
    assert "set-cookie" in replayed.headers
    assert "tasks-dashboard-http" not in cookies_of(replayed)


async def test_a_code_without_the_secret_of_its_browser_gets_no_token(browser: Browser) -> None:
    address = await browser.consent(await browser.start(OPERATOR))
    form = {
        "grant_type": "authorization_code",
        "client_id": "myDIRACClientID",
        "redirect_uri": HOME + CALLBACK,
        "code": parse_qs(urlsplit(address).query)["code"][0],
        "code_verifier": "guessed",
    }
    assert (await browser.client.post("/api/auth/token", data=form)).status_code == 400


async def test_an_invalid_code_is_refused(browser: Browser) -> None:
    state = parse_qs(urlsplit(onward(await browser.start(OPERATOR))).query)["state"][0]
    response = await browser.client.get(CALLBACK, params={"code": "invented", "state": state})
    assert response.status_code == 403
    assert session(browser) is None


@pytest.mark.parametrize(
    "target", ["https://evil.example/", "//evil.example/", "/\\evil.example", "\t//evil.example"]
)
async def test_the_sign_in_does_not_redirect_to_other_sites(browser: Browser, target: str) -> None:
    assert onward(await browser.sign_in(OPERATOR, target)) == f"{BELOW}/"


async def test_a_forged_cookie_does_not_redirect_to_other_sites(browser: Browser) -> None:
    await browser.start(OPERATOR)
    value = browser.client.cookies["tasks-dashboard-http-state"]
    forged = {"cookie": f"tasks-dashboard-http-state={value.partition('/')[0]}//evil.example/"}
    response = await browser.client.get(CALLBACK, headers=forged)
    assert f'href="{BELOW}/sign-in?next=%2F"' in response.text


async def test_cookies_are_http_only_with_minimal_path_and_domain(browser: Browser) -> None:
    started = await browser.start(OPERATOR)
    away = cookies_of(started)["tasks-dashboard-http-state"]
    for attribute in ("httponly", "samesite=lax", "max-age=300", f"path={CALLBACK}"):
        assert attribute in away.split("; ")
    last = await browser.client.get(await browser.consent(started))
    cookies = cookies_of(last)
    for attribute in ("httponly", "samesite=strict", f"path={BELOW}"):
        assert attribute in cookies["tasks-dashboard-http"].split("; ")
    assert "max-age=0" in cookies["tasks-dashboard-http-state"]


async def test_no_token_is_in_an_address_a_page_or_the_log(
    browser: Browser, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    last = await browser.sign_in(OPERATOR)
    await browser.client.get(onward(last))
    token = session(browser)
    assert token is not None
    assert token.count(".") == 2
    for response in browser.seen:
        headers = [response.request.headers.get("referer"), response.headers.get("location")]
        reported = f"{response.url} {headers} {response.text}"
        # Of the JWTs of DiracX all begin alike, the refresh token as well.
        assert token.partition(".")[0] not in reported
        assert "no-referrer" in response.text or "/sign-in/" not in str(response.url)
    assert token not in caplog.text
    assert token.partition(".")[0] not in caplog.text
    carried = [value for response in browser.seen for value in cookies_of(response).values()]
    assert len([value for value in carried if token.partition(".")[0].lower() in value]) == 1


async def test_a_session_ends_with_its_token_and_leads_back_to_the_sign_in(browser: Browser) -> None:
    from diracx.core.models import AccessTokenPayload
    from diracx.core.settings import AuthSettings
    from diracx.logic.auth.token import create_token

    await browser.sign_in(OPERATOR)
    token = session(browser)
    assert token is not None
    claims = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
    settings = AuthSettings()
    assert 0 < claims["exp"] - time.time() <= settings.access_token_expire_minutes * 60
    assert (await browser.get("/running")).status_code == 200
    over = create_token(AccessTokenPayload(**claims | {"exp": int(time.time()) - 1}), settings)
    browser.client.cookies.clear()
    browser.client.cookies.set("tasks-dashboard-http", over)
    assert (await browser.get("/running")).headers["location"] == f"{BELOW}/sign-in?next=%2Frunning"
    assert (await browser.get("/live/running")).status_code == 303


async def test_a_too_long_address_is_dropped_and_the_sign_in_continues(browser: Browser) -> None:
    last = await browser.sign_in(OPERATOR, "/locks?" + "x" * 5000)
    assert onward(last) == f"{BELOW}/"


async def test_a_form_of_another_site_begins_no_sign_in(browser: Browser) -> None:
    for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}):
        response = await browser.client.post(f"{BELOW}/sign-in/start", data={"choice": OPERATOR}, headers=headers)
        assert response.status_code == 403
        assert "set-cookie" not in response.headers


async def test_a_host_name_that_is_not_allowed_is_an_error_with_the_setting(app: Any) -> None:
    async with Browser(app, "http://other.example.org") as browser:
        page = (await browser.get("/sign-in")).text
        assert f"To sign in without a token, have http://other.example.org{CALLBACK} added to {SETTING}." in page
        assert "<select" not in page
        assert 'name="credential"' in page
        response = await browser.start(OPERATOR)
        assert response.status_code == 403
        assert SETTING in response.text
        address = onward(await Browser(app).start(OPERATOR)).replace("diracx.example.org", "evil.example.org")
        assert (await browser.client.get(address)).status_code == 400


async def test_without_the_routes_of_diracx_only_tokens_are_accepted(
    app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support.diracx_application import make_application

    monkeypatch.setenv("DIRACX_SERVICE_AUTH_ENABLED", "false")
    without = make_application()
    async with without.router.lifespan_context(without), Browser(without) as browser:
        page = (await browser.get("/sign-in")).text
    assert "<select" not in page
    assert SETTING not in page
    assert 'name="credential"' in page


async def test_while_diracx_loads_its_configuration_the_page_reports_it(app: Any, browser: Browser) -> None:
    from diracx.core.config import ConfigSource
    from diracx.core.exceptions import NotReadyError

    async def not_yet() -> None:
        raise NotReadyError("not yet")

    app.dependency_overrides[ConfigSource.create] = not_yet
    response = await browser.get("/sign-in")
    assert response.status_code == 503
    assert "The configuration of DiracX is being read" in response.text
