"""Pictures of the dashboard for its guide: `make pictures`."""

from __future__ import annotations

import asyncio
import base64
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from diracx.tasks import operations as monitor
from diracx.tasks.testing import embedded_redis
from diracx.tasks.web.auth.backends import Principal, Role, TokenBackend
from diracx.tasks.web.context import AppContext
from diracx.tasks.web.dashboard import DashboardApp
from support.dashboard_browser import chromium, expect, tab_of
from support.dashboard_night import CONFIG, VOS, a_day, a_night, an_hour, loads, steered, system_of
from support.dashboard_world import WRITER
from support.fixed_vos import ReaderWithVos
from support.waiting import until

from gubbins.dashboard import extension
from gubbins.db.sql import MyPilotDB

WIDTH = 1280
#: Address -> name of its picture.
PAGES = {
    "/": "overview",
    "/queues": "queues",
    "/running": "running",
    "/delayed": "delayed",
    "/workers": "workers",
    "/failures": "failures",
    "/dead-letters": "dead-letters",
    "/schedules": "schedules",
    "/locks": "locks",
    "/groups": "groups",
    "/configuration?task=transfers:CopyFile": "configuration",
    "/pilots": "pilots",
    "/audit": "audit",
}


async def _take(page: Any, file: Path) -> None:
    """A picture of a page down to the end of what is on it."""
    bottom = await page.evaluate(
        "Math.max(...[...document.querySelectorAll('main *')].map((one) => one.getBoundingClientRect().bottom))"
    )
    await page.set_viewport_size({"width": WIDTH, "height": int(min(max(bottom + 24, 730), 900))})
    session = await page.context.new_cdp_session(page)
    taken = await session.send("Page.captureScreenshot", {"format": file.suffix[1:], "quality": 72})
    file.write_bytes(base64.b64decode(taken["data"]))
    await session.detach()


async def draw(folder: Path, kind: str) -> None:
    """Fill a system, and take the pictures, as `webp` or `png`."""
    with tempfile.TemporaryDirectory() as made, embedded_redis() as redis_url:
        os.chdir(made)
        Path("tasks.yaml").write_text(CONFIG)
        os.environ["DIRACX_TASKS_CONFIG"] = "tasks.yaml"
        os.environ["DIRACX_DB_URL_MYPILOTDB"] = pilots_url = f"sqlite+aiosqlite:///{made}/pilots.db"
        pilots = MyPilotDB(pilots_url)
        async with pilots.engine_context(), system_of(redis_url) as system:
            await pilots.create_tables()
            followed = await a_day(pilots)
            redis = system.broker.redis
            await an_hour(redis)
            await a_night(system)

            async def seen() -> bool:
                running = (await monitor.running(redis)).items
                return len(running) >= 13 and len((await monitor.failures(redis)).items) >= 4

            await until(seen)
            reader = ReaderWithVos.from_environment()
            assert isinstance(reader, ReaderWithVos)
            reader.vos = tuple(VOS)
            context = AppContext(system.broker, system.registry, reader, system.task_db, "production")
            await steered(context)
            now = time.time()
            context.loads.extend(loads(now))

            async def this() -> AppContext:
                return context

            backend = TokenBackend({WRITER: Principal("wilma", Role.WRITE, None)}, "")
            app = DashboardApp(this, backend, hosts={"127.0.0.1"}, extensions=[extension()])
            pages = PAGES | {f"/pilots/{followed}": "pilot", f"/pilots/{followed}/output": "pilot-output"}
            async with chromium() as browser, tab_of(browser, app, WRITER) as tab:
                await tab.page.set_viewport_size({"width": WIDTH, "height": 900})
                for address, name in pages.items():
                    await tab.open(address)
                    if await tab.page.locator("#state").count():
                        await expect(tab.page.locator("#state")).to_have_text("live")
                    await _take(tab.page, folder / f"dashboard-{name}.{kind}")
            await app.aclose()


if __name__ == "__main__":
    asyncio.run(draw(Path(sys.argv[1]).resolve(), *sys.argv[2:] or ["webp"]))
