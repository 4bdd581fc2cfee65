"""Dashboard pages about pilots in a real browser: security, accessibility, keyboard."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from diracx.tasks.operations.audit import read_audit
from diracx.tasks.plumbing.broker import RedisStreamBroker
from diracx.tasks.plumbing.config.reader import ConfigReader
from diracx.tasks.plumbing.registry import TaskRegistry
from diracx.tasks.web.auth.backends import Principal, Role, TokenBackend
from diracx.tasks.web.context import AppContext
from diracx.tasks.web.dashboard import DashboardApp
from redis.asyncio import Redis
from support.dashboard_browser import Tab, expect, needs_chromium, tab_of

from gubbins.dashboard import extension
from gubbins.dashboard.actions import ACTIONS
from gubbins.db.sql import MyPilotDB
from gubbins.domain.pilot_states import MyPilotStatus

pytestmark = [needs_chromium, pytest.mark.asyncio(loop_scope="module")]
HOSTILE = "<script>window.hacked=1</script>\"'><img src=x onerror=window.hacked=1>"
WRITER, READER = "the-token-of-wilma", "the-token-of-rita"


@pytest_asyncio.fixture(loop_scope="module")
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="module")
async def sqlite_db(sqlite_url: str, tmp_path: Path, tables_of: Any) -> AsyncIterator[MyPilotDB]:
    database = MyPilotDB(await tables_of("sqlite", tmp_path / "pilots.db", None))
    async with database.engine_context():
        yield database


@pytest_asyncio.fixture(loop_scope="module")
async def app(
    sqlite_db: MyPilotDB, sqlite_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[DashboardApp]:
    monkeypatch.setenv("DIRACX_DB_URL_MYPILOTDB", sqlite_url)
    await _fill(sqlite_db)
    broker = RedisStreamBroker(redis_url)

    async def context() -> AppContext:
        return AppContext(broker, TaskRegistry.of({}), ConfigReader())

    tokens = {WRITER: Principal("wilma", Role.WRITE, None), READER: Principal("rita", Role.READ, None)}
    made = DashboardApp(context, TokenBackend(tokens, ""), hosts={"127.0.0.1"}, extensions=[extension()])
    yield made
    await made.aclose()
    await broker.shutdown()


@pytest_asyncio.fixture(loop_scope="module")
async def tab(app: DashboardApp, browser: Any) -> AsyncIterator[Tab]:
    async with tab_of(browser, app, WRITER) as made:
        yield made


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
            ("ce01.example.org", "lhcb", 5),
            ("ce01.example.org", "gridpp", 4),
            ("ce02.example.org", "lhcb", 4),
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


async def test_every_page_about_pilots_is_safe_small_and_accessible(tab: Tab) -> None:
    for address in (
        "/pilots",
        "/pilots?vo=lhcb&ce=example&state=open",
        "/pilots/list",
        "/pilots/list?status=FAILED",
        "/pilots/7",
        "/pilots/14",
        "/pilots/7/output",
    ):
        await tab.check(address)
    await tab.open("/pilots")
    await expect(tab.page.locator("figure.chart canvas")).to_have_count(2)
    await expect(tab.page.get_by_role("link", name=HOSTILE)).to_be_visible()
    await tab.page.get_by_role("link", name=HOSTILE).click()
    await expect(tab.page.get_by_text("1 pilot", exact=False).first).to_be_visible()
    assert await tab.page.evaluate("window.hacked") is None
    assert not tab.errors


async def test_a_compute_element_of_any_name_is_closed_and_opened_by_keyboard_alone(
    tab: Tab, sqlite_db: MyPilotDB, redis: Redis
) -> None:
    name = HOSTILE
    await tab.open("/pilots")
    row = tab.page.get_by_role("row").filter(has=tab.page.get_by_role("link", name=name, exact=True))
    await tab.answer_by_keyboard(
        row.get_by_role("button", name="Close"), f"Close {name} for new pilots?", "Close it"
    )
    await expect(tab.page.get_by_role("status")).to_contain_text(f"{name}: closed.")
    await expect(row.get_by_role("cell", name="closed", exact=True).first).to_be_visible()
    assert not (await sqlite_db.get_ce(name))["enabled"]
    await tab.answer_by_keyboard(row.get_by_role("button", name="Open"), f"Open {name} for new pilots?", "Open it")
    await expect(tab.page.get_by_role("status")).to_contain_text(f"{name}: open.")
    assert (await sqlite_db.get_ce(name))["enabled"]
    assert [(entry.who, entry.target) for entry in await read_audit(redis)] == [("wilma", name)] * 2
    assert await tab.page.evaluate("window.hacked") is None
    assert not tab.errors


async def test_a_compute_element_is_banned_and_opened_and_a_pilot_is_cancelled(
    tab: Tab, sqlite_db: MyPilotDB, redis: Redis
) -> None:
    name, why = "ce02.example.org", f"flood {HOSTILE}"
    await tab.open("/pilots")
    row = tab.page.get_by_role("row").filter(has=tab.page.get_by_role("link", name=name, exact=True))
    button = row.get_by_role("button", name="Ban")
    await tab.answer(button, f"Ban {name}?", "Ban it", f"{name}: banned, flood <script>", reason=why)
    ce = await sqlite_db.get_ce(name)
    assert (ce["ban_reason"], ce["enabled"]) == (why, False)
    await expect(row.get_by_role("cell", name="banned", exact=True)).to_be_visible()
    await expect(tab.page.get_by_role("row").filter(has_text="flood <script>")).to_be_visible()
    await tab.check("/pilots?state=banned")
    await tab.answer(row.get_by_role("button", name="Open"), f"Open {name}", "Open it", f"{name}: open.")
    ce = await sqlite_db.get_ce(name)
    assert (ce["banned_at"], ce["enabled"]) == (None, True)

    await tab.open("/pilots/list?status=RUNNING")
    await tab.page.get_by_role("table").get_by_role("link").first.click()
    number = int(tab.page.url.rpartition("/")[2])
    button = tab.page.get_by_role("button", name="Cancel it…")
    await tab.answer(
        button, f"Cancel pilot {number}?", "Cancel it", f"The cancellation of pilot {number} was requested"
    )
    assert (await sqlite_db.get_pilot(number))["cancel_requested_at"] is not None
    await expect(tab.page.get_by_role("button", name="Cancel it…")).to_have_count(0)
    await tab.open("/audit")
    for action in ("ban compute element", "open compute element", "cancel pilot"):
        await expect(tab.page.get_by_role("row").filter(has_text=action)).to_contain_text("wilma")
    assert await tab.page.evaluate("window.hacked") is None
    assert not tab.errors


async def test_compute_elements_are_filtered_and_paged_by_keyboard_alone(tab: Tab, sqlite_db: MyPilotDB) -> None:
    for number in range(60):
        await sqlite_db.add_ce(f"farm-{number:02}.example.org", 5, 1.0)
    await tab.open("/pilots")
    box = tab.page.get_by_role("searchbox", name="Compute element")
    await box.focus()
    await tab.page.keyboard.type("FARM")
    await tab.page.keyboard.press("Enter")
    ces = tab.page.get_by_role("link", name="farm-")
    await expect(ces).to_have_count(40)
    await expect(box).to_have_value("FARM")
    await tab.press(tab.page.get_by_role("link", name="Next page of the compute elements"), "Enter")
    await expect(ces).to_have_count(20)
    await expect(ces.last).to_have_text("farm-59.example.org")
    await tab.press(tab.page.get_by_role("link", name="First page of the compute elements"), "Enter")
    await expect(ces.first).to_have_text("farm-00.example.org")
    assert not tab.errors


async def test_a_read_only_user_can_see_pilots_and_change_nothing(
    app: DashboardApp, sqlite_db: MyPilotDB, redis: Redis, browser: Any
) -> None:
    before = await sqlite_db.list_ces(), await sqlite_db.get_pilot(1)
    async with tab_of(browser, app, READER) as tab:
        for address in ("/pilots", "/pilots/1", "/pilots/1/output"):
            await tab.open(address)
            posting = tab.page.locator('form[method="post"]:not([action$="/sign-out"])')
            await expect(posting).to_have_count(0)
        sent = {"ce": "ce01.example.org", "pilot": "1", "reason": "none"}
        refused = {action.path: await tab.is_refused(action.path, **sent) for action in ACTIONS}
    assert all(refused.values()), refused
    assert (await sqlite_db.list_ces(), await sqlite_db.get_pilot(1)) == before
    assert await read_audit(redis) == []
