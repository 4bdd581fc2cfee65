"""The dashboard in a real browser: nothing in it can do harm, everyone can use it, and it follows what happens."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from dashboard_world import WRITER, Urgent, World, small_world, until
from diracx.tasks import monitor
from diracx.tasks.dashboard.audit import read_audit
from diracx.tasks.dashboard.pages import PAGES
from diracx.tasks.plumbing.broker.models import Submission, TaskMessage
from redis.asyncio import Redis

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.async_api", reason="pip install playwright")
axe = pytest.importorskip("axe_playwright_python", reason="pip install axe-playwright-python")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
playwright.expect.set_options(timeout=20_000)  # on a busy machine, too

#: Everything that a page needs, its scripts and styles included.
LARGEST = 300_000
#: Where to put pictures of all pages; nowhere by default.
PICTURES = os.environ.get("DASHBOARD_PICTURES")
ADDRESSES = [page.path for page in PAGES if "{" not in page.path and page.path != "/locks/one"]


@pytest.fixture
async def world(redis_url: str) -> AsyncIterator[World]:
    async with small_world(redis_url) as made:
        yield made


@asynccontextmanager
async def served(world: World) -> AsyncIterator[str]:
    """The dashboard on a port of its own."""
    import uvicorn

    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(world.app, log_level="error", access_log=False, timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            world.app.end_streams()
            server.should_exit = True
            await serving


class Tab:
    """A page of the browser, and what went wrong in it."""

    def __init__(self, page: Any, home: str) -> None:
        self.page = page
        self.home = home
        self.complaints: list[str] = []
        self.bytes = 0
        page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    async def open(self, path: str) -> None:
        await self.page.goto(self.home + path)
        assert await self.page.evaluate("window.hacked") is None, path


@pytest.fixture
async def tab(world: World, request: pytest.FixtureRequest) -> AsyncIterator[Tab]:
    scheme = getattr(request, "param", "light")
    async with served(world) as home, playwright.async_playwright() as started:
        browser = await started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        context = await browser.new_context(color_scheme=scheme, viewport={"width": 1360, "height": 860})
        made = Tab(await context.new_page(), home)
        await made.open(f"/sign-in?token={WRITER}")
        yield made
        await browser.close()


@pytest.mark.parametrize("tab", ["light", "dark"], indirect=True)
async def test_every_page_is_harmless_light_and_usable_by_everyone(
    tab: Tab, world: World, request: pytest.FixtureRequest
) -> None:
    from axe_playwright_python.async_playwright import Axe

    lock = next(task for task in (await monitor.running(world.system.broker.redis)).items if task.locks).locks[0]
    [group] = await monitor.groups(world.system.broker.redis)
    addresses = [
        *ADDRESSES,
        "/queues/realtime:large",
        "/dead-letters/1",
        f"/groups/{group.group_id}",
        "/configuration?task=test:Fail",
        "/nothing",
    ]
    for address in addresses:
        await tab.open(address)
        found = await Axe().run(tab.page)
        problems = [
            f"{each['id']}: {each['nodes'][0]['html'][:200]} {each['nodes'][0]['failureSummary'][:300]}"
            for each in found.response["violations"]
        ]
        assert not problems, f"{address}: " + "\n".join(problems)
        weight = await tab.page.evaluate(
            "performance.getEntries().reduce((sum, one) => sum + (one.decodedBodySize || 0), 0)"
        )
        assert 5_000 < weight < LARGEST, address
        if PICTURES:
            name = address.strip("/").replace("/", "-").replace(":", "-").partition("?")[0] or "overview"
            scheme = (
                "dark" if await tab.page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") else ""
            )
            await tab.page.screenshot(path=Path(PICTURES) / f"dashboard-{name}{'-' * bool(scheme)}{scheme}.png")
    await tab.page.goto(f"{tab.home}/locks/one")
    await tab.page.goto(tab.home + "/locks")
    await tab.page.get_by_role("link", name=lock[:30]).first.click()
    await tab.page.get_by_role("button", name="Release it").wait_for()
    unforeseen = [text for text in tab.complaints if "404" not in text]
    assert not unforeseen, unforeseen


async def test_a_page_follows_what_happens_and_can_be_paused(tab: Tab, world: World) -> None:
    await tab.open("/queues")
    row = tab.page.get_by_role("row", name="realtime large")
    await playwright.expect(row.get_by_role("cell").first).to_have_text("1")
    await playwright.expect(tab.page.locator("#state")).to_have_text("live")
    await _submit(world, 1)
    await playwright.expect(row.get_by_role("cell").first).to_have_text("2")
    await tab.page.get_by_role("button", name="Pause").click()
    await _submit(world, 2)
    seen = asyncio.Event()
    tab.page.on("response", lambda _: seen.set())
    await tab.page.wait_for_timeout(4500)  # two more looks of the server, which must change nothing
    await playwright.expect(row.get_by_role("cell").first).to_have_text("2")
    await tab.page.get_by_role("button", name="Go on").click()
    await playwright.expect(row.get_by_role("cell").first).to_have_text("3")


async def test_the_overview_draws_its_charts(tab: Tab) -> None:
    await tab.open("/")
    await playwright.expect(tab.page.locator("figure.chart canvas")).to_have_count(2)
    await playwright.expect(
        tab.page.get_by_role("img", name="Load, while you watch; latest: waiting 1")
    ).to_be_visible()
    assert not tab.complaints


async def test_an_action_is_asked_about_in_a_dialog_and_done_by_keyboard_alone(
    tab: Tab, world: World, redis: Redis
) -> None:
    await tab.open("/schedules?vo=lhcb")
    button = tab.page.get_by_role("button", name="Pause").last
    await button.focus()
    await tab.page.keyboard.press("Enter")
    dialog = tab.page.get_by_role("dialog", name="Pause test:Tidy/lhcb?")
    await dialog.wait_for()
    await playwright.expect(dialog.get_by_role("link", name="Leave it")).to_be_focused()
    await tab.page.keyboard.press("Escape")
    await playwright.expect(dialog).to_be_hidden()
    assert await read_audit(redis) == []
    await button.focus()
    await tab.page.keyboard.press("Enter")
    await dialog.wait_for()
    await tab.page.keyboard.press("Tab")
    await tab.page.keyboard.press("Enter")
    await playwright.expect(tab.page.get_by_role("status")).to_contain_text("test:Tidy/lhcb paused")
    await playwright.expect(tab.page.get_by_role("button", name="Resume")).to_be_visible()
    [entry] = await read_audit(redis)
    assert entry.action == "pause schedules"
    assert not tab.complaints


async def test_several_dead_letters_are_chosen_and_discarded_at_once(tab: Tab, world: World) -> None:
    await tab.open("/dead-letters")
    discard = tab.page.get_by_role("button", name="Discard chosen")
    await playwright.expect(discard).to_be_disabled()
    await tab.page.get_by_label("Choose number 1").check()
    await tab.page.get_by_label("Choose number 3").check()
    await playwright.expect(tab.page.get_by_text("2 chosen")).to_be_visible()
    await discard.click()
    dialog = tab.page.get_by_role("dialog", name="Discard 2 dead letters?")
    await dialog.get_by_role("button", name="Discard").click()
    await playwright.expect(tab.page.get_by_role("status")).to_contain_text("2 dead letters discarded")

    async def decided() -> bool:
        return (await world.letters()).count("DISCARDED") == 2

    await until(decided)
    assert not tab.complaints


async def test_the_colours_are_as_chosen_on_the_next_page_as_well(tab: Tab) -> None:
    await tab.open("/workers")
    await tab.page.get_by_role("button", name="Dark").click()
    await tab.open("/locks")
    assert await tab.page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert await tab.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 27)"


async def _submit(world: World, number: int) -> None:
    message = TaskMessage(task_id=f"{number:032x}", task_name=f"test:{Urgent.__name__}", task_args=["more"])
    await world.system.broker.submit([Submission(message, "diracx:tasks:realtime:large")])
