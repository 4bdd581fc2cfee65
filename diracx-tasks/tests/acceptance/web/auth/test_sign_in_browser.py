"""Sign-in to the dashboard of a DiracX application at an identity provider, in a real browser."""

from __future__ import annotations

import re
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from support.dashboard_browser import Tab, expect, needs_chromium, new_tab, served
from support.dashboard_sign_in import BELOW, CALLBACK, application
from support.diracx_application import with_short_streams

pytestmark = [needs_chromium, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(loop_scope="module")
async def tab(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, redis_url: str) -> AsyncIterator[Tab]:
    """A browser takes `localhost` and the provider's `127.0.0.1` for two sites."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        home = f"http://localhost:{listening.getsockname()[1]}"
        async with (
            application(monkeypatch, tmp_path, redis_url, [home + CALLBACK]) as app,
            served(with_short_streams(app, 1.0), listening),
            new_tab(browser, home + BELOW) as made,
        ):
            yield made


async def test_an_operator_signs_in_and_returns_to_the_requested_page(tab: Tab) -> None:
    page = tab.page
    requested: list[str] = []
    page.on("request", lambda request: requested.append(f"{request.url} {request.headers.get('referer', '')}"))
    await tab.check("/sign-in?next=/queues")
    await expect(page.get_by_label("VO and group")).to_be_focused()
    await page.get_by_label("VO and group").select_option("vo:gridpp group:admins")
    await page.get_by_role("button", name="Sign in", exact=True).click()
    await expect(page.get_by_role("heading", name="Let DiracX know who you are?")).to_be_visible()
    await page.get_by_role("button", name="Allow").click()
    await page.wait_for_url(f"{tab.home}/queues")
    await expect(page.get_by_role("heading", name="Queues", level=1)).to_be_visible()
    await expect(page.locator(".who")).to_have_text(re.compile("fred"))
    token = next(c for c in await page.context.cookies() if re.fullmatch(r"tasks-dashboard-\d+", c["name"]))
    assert token["httpOnly"]
    assert token["sameSite"] == "Strict"
    assert not [each for each in requested if token["value"].partition(".")[0] in each]
    # The next site does not get the address with the code in it (Referer).
    assert not [each for each in requested if "code=" in each.partition(" ")[2]]
    await page.get_by_role("button", name="Sign out").click()
    await page.wait_for_url(f"{tab.home}/sign-in")
    assert [each["name"] for each in await page.context.cookies()] == ["tasks-dashboard-choice"]
    await expect(page.get_by_label("VO and group")).to_have_value("vo:gridpp group:admins")
    assert not tab.errors, tab.errors


async def test_the_sign_in_works_without_scripts_and_by_keyboard(tab: Tab) -> None:
    context = await tab.page.context.browser.new_context(java_script_enabled=False)
    page = await context.new_page()
    await page.goto(f"{tab.home}/locks")
    await page.get_by_label("VO and group").press("ArrowDown")
    await expect(page.get_by_label("VO and group")).to_have_value("vo:gridpp group:admins")
    await page.keyboard.press("Tab")
    await page.keyboard.press("Enter")
    await page.get_by_role("button", name="Allow").click()
    await page.wait_for_url(f"{tab.home}/locks")
    await expect(page.get_by_role("heading", name="Locks", level=1)).to_be_visible()


async def test_a_live_page_with_an_expired_session_leads_to_the_sign_in_and_back(tab: Tab) -> None:
    page = tab.page
    await tab.open("/queues")
    for _ in range(2):
        await page.get_by_label("VO and group").select_option("vo:lhcb group:operators")
        await page.get_by_role("button", name="Sign in", exact=True).click()
        await page.get_by_role("button", name="Allow").click()
        await expect(page.locator("#state")).to_have_text("live")
        await page.context.clear_cookies()
        await page.wait_for_url(f"{tab.home}/sign-in?next=%2Fqueues")
