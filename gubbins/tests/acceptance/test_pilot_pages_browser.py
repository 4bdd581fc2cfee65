"""The pages about pilots in a real browser: harmless, usable by everyone, and steered by keyboard alone."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from dashboard_browser import Tab, expect, needs_chromium, tab_of
from diracx.tasks.dashboard import create_app
from diracx.tasks.dashboard.access import Account, Role, TokenGate, digest_of
from diracx.tasks.dashboard.installation import Installation
from diracx.tasks.monitor.audit import read_audit
from diracx.tasks.plumbing.broker import RedisStreamBroker
from diracx.tasks.plumbing.config_source import ConfigReader
from diracx.tasks.plumbing.factory import TaskRegistry
from redis.asyncio import Redis

from gubbins.dashboard import extension
from gubbins.db.sql import MyPilotDB
from gubbins.pilot_states import MyPilotStatus

pytestmark = needs_chromium
HOSTILE = "<script>window.hacked=1</script>\"'><img src=x onerror=window.hacked=1>"
TOKEN = "the-token-of-wilma"


@pytest.fixture
async def tab(
    sqlite_db: MyPilotDB,
    sqlite_url: str,
    redis_url: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> AsyncIterator[Tab]:
    monkeypatch.setenv("DIRACX_DB_URL_MYPILOTDB", sqlite_url)
    await _fill(sqlite_db)
    broker = RedisStreamBroker(redis_url)

    async def installation() -> Installation:
        return Installation(broker, TaskRegistry.of({}), ConfigReader())

    gate = TokenGate([Account("wilma", Role.WRITE, digest_of(TOKEN))], "")
    app = create_app(installation, gate, hosts={"127.0.0.1"}, extensions=[extension()])
    try:
        async with tab_of(app, TOKEN, getattr(request, "param", "light")) as made:
            yield made
    finally:
        await app.aclose()
        await broker.shutdown()


async def _fill(db: MyPilotDB) -> None:
    await db.add_ce("ce01.example.org", 40, 0.9)
    await db.add_ce("ce02.example.org", 25, 0.9)
    await db.add_ce("drained.example.org", 10, 0.5, enabled=False)
    await db.add_ce(HOSTILE, 2, 1.0)
    await db.record_ce_error(HOSTILE, HOSTILE)
    await db.record_ce_error(
        "ce02.example.org", "ssh: connect to host ce02.example.org port 22: Connection timed out"
    )
    pilots = [
        (await db.submit_pilot(ce, vo), number)
        for ce, vo, how_many in (
            ("ce01.example.org", "lhcb", 14),
            ("ce01.example.org", "gridpp", 9),
            ("ce02.example.org", "lhcb", 11),
            (HOSTILE, "lhcb", 1),
        )
        for number in range(how_many)
    ]
    for pilot, number in pilots:
        which = pilot if isinstance(pilot, int) else pilot["pilot_id"]
        if number % 4:
            await db.update_pilot_status(which, MyPilotStatus.RUNNING)
        if number % 4 > 1:
            await db.update_pilot_status(which, MyPilotStatus.DONE if number % 3 else MyPilotStatus.FAILED)


@pytest.mark.parametrize("tab", ["light", "dark"], indirect=True)
async def test_every_page_about_pilots_is_harmless_light_and_usable_by_everyone(tab: Tab) -> None:
    for address in (
        "/pilots",
        "/pilots?vo=lhcb",
        "/pilots/list",
        "/pilots/list?status=FAILED",
        "/pilots/7",
        "/pilots/35",
    ):
        await tab.check(address)
    await tab.open("/pilots")
    await expect(tab.page.locator("figure.chart canvas")).to_have_count(2)
    await expect(tab.page.get_by_role("link", name=HOSTILE)).to_be_visible()
    await tab.page.get_by_role("link", name=HOSTILE).click()
    await expect(tab.page.get_by_text("1 pilot", exact=False).first).to_be_visible()
    assert await tab.page.evaluate("window.hacked") is None
    assert not tab.complaints


@pytest.mark.parametrize("name", ["ce01.example.org", HOSTILE])
async def test_a_compute_element_is_closed_and_opened_by_keyboard_alone(
    tab: Tab, sqlite_db: MyPilotDB, redis: Redis, name: str
) -> None:
    await tab.open("/pilots")
    row = tab.page.get_by_role("row").filter(has=tab.page.get_by_role("link", name=name, exact=True))
    await tab.answer_by_keyboard(row.get_by_role("button"), f"Close {name} for new pilots?", "Close it")
    await expect(tab.page.get_by_role("status")).to_contain_text(f"{name}: closed.")
    await expect(row.get_by_role("cell", name="closed", exact=True).first).to_be_visible()
    assert not (await sqlite_db.get_ce(name))["enabled"]
    await tab.answer_by_keyboard(row.get_by_role("button"), f"Open {name} for new pilots?", "Open it")
    await expect(tab.page.get_by_role("status")).to_contain_text(f"{name}: open.")
    assert (await sqlite_db.get_ce(name))["enabled"]
    assert [(entry.who, entry.target) for entry in await read_audit(redis)] == [("wilma", name)] * 2
    assert await tab.page.evaluate("window.hacked") is None
    assert not tab.complaints
