"""A real browser for tests of the dashboards."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import servers
from diracx.tasks.web.dashboard import DashboardApp

playwright = pytest.importorskip("playwright.async_api", reason="pip install playwright")
axe = pytest.importorskip("axe_playwright_python.base", reason="pip install axe-playwright-python")
try:
    CHROMIUM: str | None = servers.chromium()
except servers.MissingError:
    CHROMIUM = None
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: `make servers`")
playwright.expect.set_options(timeout=20_000)  # on a busy machine, too
expect = playwright.expect

#: Everything that a page needs, its scripts and styles included.
LARGEST = 300_000
DESK = {"width": 1360, "height": 860}
TELEPHONE = {"width": 390, "height": 844}


class Tab:
    """A page of the browser, and its errors."""

    def __init__(self, page: Any, home: str) -> None:
        self.page = page
        self.home = home
        self.errors: list[str] = []
        page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    async def open(self, path: str) -> None:
        """Go there, and see that nothing ran that should not."""
        await self.page.goto(self.home + path)
        assert await self.page.evaluate("window.hacked") is None, path

    async def check(self, address: str) -> None:
        """A page that everyone can use, on a telephone and in the dark too, and that is not too heavy."""
        await self.open(address)
        weight = await self.page.evaluate(
            "performance.getEntries().reduce((sum, one) => sum + (one.decodedBodySize || 0), 0)"
        )
        assert 5_000 < weight < LARGEST, address
        await self.page.evaluate(axe.AXE_SCRIPT)
        problems = await self._problems() + await self._too_wide(DESK) + await self._on_a_telephone()
        problems += await self._in_the_dark()
        assert not problems, f"{address}: " + "\n".join(problems)

    async def _on_a_telephone(self) -> list[str]:
        await self.page.set_viewport_size(TELEPHONE)
        await self.page.evaluate(
            "new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))"
        )
        # Contrast and names do not depend on the width: what does is whether all can be reached.
        problems = await self._problems("scrollable-region-focusable", "meta-viewport")
        problems += await self._too_wide(TELEPHONE)
        await self.page.set_viewport_size(DESK)
        return problems

    async def _in_the_dark(self) -> list[str]:
        """List the problems of contrast: nothing else depends on the colours."""
        await self.page.emulate_media(color_scheme="dark")
        problems = await self._problems("color-contrast")
        await self.page.emulate_media(color_scheme="light")
        return problems

    async def _too_wide(self, screen: dict[str, int]) -> list[str]:
        width = await self.page.evaluate("document.documentElement.scrollWidth")
        return [f"it is {width} px wide on a screen of {screen['width']} px"] if width > screen["width"] else []

    async def _problems(self, *rules: str) -> list[str]:
        """List violations of these rules for accessible pages; none given: of all rules."""
        options = {"resultTypes": ["violations"], **({"runOnly": rules} if rules else {})}
        found = await self.page.evaluate("(options) => axe.run(options)", options)
        return [
            f"{each['id']}: {each['nodes'][0]['html'][:200]} {each['nodes'][0]['failureSummary'][:300]}"
            for each in found["violations"]
        ]

    async def press(self, where: Any, key: str) -> None:
        """Press a key there, when the focus is there: not before, for keys go to whatever has it."""
        await expect(where).to_be_visible()
        await where.focus()
        await expect(where).to_be_focused()
        await self.page.keyboard.press(key)

    async def answer(self, button: Any, question: str, yes: str, outcome: str, reason: str = "") -> None:
        """Press a button, enter the reason if requested, confirm, and return the message."""
        await button.click()
        dialog = self.page.get_by_role("dialog", name=question)
        if reason:
            await expect(dialog.get_by_role("textbox")).to_be_focused()
            await dialog.get_by_role("textbox").fill(reason)
        await dialog.get_by_role("button", name=yes, exact=True).click()
        await expect(self.page.get_by_role("status")).to_contain_text(outcome)

    async def is_refused(self, path: str, **fields: str) -> bool:
        """True if a form that was made by hand, with all that a form of ours has, comes to nothing."""
        await self.open("/audit")
        token = await self.page.locator('[name="form_token"]').first.input_value()
        status, text = await self.page.evaluate(
            "async ([to, fields]) => { const response = await fetch(to, {method: 'POST', "
            "body: new URLSearchParams(fields)}); return [response.status, await response.text()]; }",
            [self.home + path, {**fields, "form_token": token, "confirmed": "yes"}],
        )
        return status == 403 and "your role is `read`" in text

    async def answer_by_keyboard(self, button: Any, question: str, yes: str) -> None:
        """Press a button and cancel, then press it again and confirm."""
        dialog = self.page.get_by_role("dialog", name=question)
        await self.press(button, "Enter")
        await expect(dialog.get_by_role("link", name="Go back")).to_be_focused()
        await self.page.keyboard.press("Escape")
        await expect(dialog).to_be_hidden()
        await self.press(button, "Enter")
        await expect(dialog.get_by_role("link", name="Go back")).to_be_focused()
        await self.page.keyboard.press("Tab")
        await expect(dialog.get_by_role("button", name=yes)).to_be_focused()
        await self.page.keyboard.press("Enter")


@asynccontextmanager
async def tab_of(browser: Any, app: DashboardApp, token: str, *, scripts: bool = True) -> AsyncIterator[Tab]:
    """A tab that has signed in, with the dashboard on a port of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        async with served(app, listening):
            home = f"http://127.0.0.1:{listening.getsockname()[1]}"
            try:
                async with new_tab(browser, home, scripts=scripts) as made:
                    await made.page.goto(f"{home}/sign-in?token={token}")
                    yield made
            finally:
                app.end_streams()


@asynccontextmanager
async def new_tab(browser: Any, home: str, *, scripts: bool = True) -> AsyncIterator[Tab]:
    """An empty tab without cookies, in which colours change at once."""
    context = await browser.new_context(viewport=DESK, java_script_enabled=scripts, reduced_motion="reduce")
    try:
        yield Tab(await context.new_page(), home)
    finally:
        await context.close()


@asynccontextmanager
async def chromium() -> AsyncIterator[Any]:
    """A browser for the tabs of one event loop."""
    async with playwright.async_playwright() as started:
        browser = await started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def served(app: Any, listening: socket.socket) -> AsyncIterator[None]:
    """An application that is served there. What it opens with its lifespan is for the caller to open."""
    import uvicorn

    config = uvicorn.Config(
        app, lifespan="off", log_config=None, log_level="error", access_log=False, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving
