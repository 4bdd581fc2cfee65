"""Actions of the dashboard in a real browser: effects, audit log, refusals for readers."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import pytest
from diracx.tasks import operations as monitor
from diracx.tasks.operations.audit import read_audit
from diracx.tasks.plumbing._util.printable import printable
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.web.dashboard.pages import ACTIONS, PAGES
from redis.asyncio import Redis
from support.dashboard_browser import Tab, expect, needs_chromium, tab_of
from support.dashboard_world import HOSTILE, READER, WRITER, World
from support.waiting import until

pytestmark = [needs_chromium, pytest.mark.asyncio(loop_scope="module")]
ADDRESSES = [page.path for page in PAGES if "{" not in page.path and page.path != "/locks/one"]


async def runs(redis: Redis, name: str, argument: str = HOSTILE) -> list[monitor.RunningTask]:
    found = (await monitor.running(redis)).items
    return [task for task in found if task.task_name == name and argument in (task.arguments or {}).values()]


async def in_audit_log(tab: Tab, *wanted: tuple[str, str, str]) -> None:
    """The audit log has these entries, newest first: action, target and outcome."""
    await tab.check("/audit")
    rows = tab.page.get_by_role("table").locator("tbody tr")
    await expect(rows).to_have_count(len(wanted))
    for number, (action, target, outcome) in enumerate(wanted):
        cells = rows.nth(number)
        await expect(cells).to_contain_text("wilma")
        for text in (action, target, outcome):
            await expect(cells).to_contain_text(text)


async def test_a_task_is_cancelled_a_queue_purged_and_a_lock_released(
    tab: Tab, world: World, redis: Redis
) -> None:
    [held] = await runs(redis, "test:Hold")
    await tab.open("/running")
    cancel = tab.page.locator(f'[id="cancel-{held.task_id}"]')
    await tab.answer(cancel, "Cancel this task?", "Cancel it", f"Cancelled: {held.task_id} (running)")

    async def cancelled() -> bool:
        return not await runs(redis, "test:Hold")

    await until(cancelled)

    await tab.open("/queues/realtime:large")
    purge = tab.page.get_by_role("button", name="Cancel all waiting tasks")
    await tab.answer(
        purge, "Cancel all tasks that wait in realtime:large?", "Cancel them", "1 tasks were cancelled"
    )
    assert await redis.xlen("diracx:tasks:realtime:large") == 0

    [first] = await runs(redis, "test:HoldSite")
    [lock] = first.locks
    await tab.open(f"/locks/one?key={quote(lock, safe='')}")
    release = tab.page.get_by_role("button", name="Release lock…")
    await tab.answer(
        release, f"Release {printable(lock)} of", "Release lock", f"Released: 1, from {first.task_id}"
    )

    async def next_in_line() -> bool:
        return any(task.task_id != first.task_id for task in await runs(redis, "test:HoldSite"))

    await until(next_in_line)
    await in_audit_log(
        tab,
        ("release lock", lock[:40], f"1 released, from {first.task_id}"),
        ("purge queue", "realtime:large", "1 tasks removed"),
        ("cancel tasks", held.task_id, "1 running"),
    )
    assert not tab.errors


async def test_schedules_are_paused_resumed_and_run_and_dead_letters_retried_and_discarded(
    tab: Tab, world: World, redis: Redis
) -> None:
    schedule = "test:Tidy/lhcb"
    await tab.open("/schedules?vo=lhcb")
    button = tab.page.locator(f'[id="pause-{schedule}"]')
    await tab.answer(button, f"Pause {schedule}?", "Pause", f"{schedule} paused")
    assert await redis.hkeys(keys.PAUSED) == [schedule.encode()]  # type: ignore[misc]  # redis-py: either
    await expect(tab.page.get_by_role("row", name="test:Tidy")).to_contain_text("paused")
    await tab.answer(button, f"Resume {schedule}?", "Resume", f"{schedule} resumed")
    assert not await redis.exists(keys.PAUSED)
    run_now = tab.page.locator(f'[id="run-{schedule}"]')
    await tab.answer(run_now, f"Run {schedule} now?", "Run now", "Submitted: ")

    async def has_run() -> bool:
        return any(each.task_name == "test:Tidy" and each.done for each in await monitor.stats(redis))

    await until(has_run)

    await tab.open("/dead-letters?task=test:Fail")
    await tab.page.get_by_label("Select number 1").check()
    again = tab.page.get_by_role("button", name="Submit selected again")
    await tab.answer(again, "Submit 1 dead letter again?", "Submit again", "1 dead letter submitted again")

    async def failed_again() -> bool:
        return await _failures(world, 1) == 2 and (await world.dead_letters()).count("PENDING") == 4

    await until(failed_again)
    await tab.open("/dead-letters?task=test:Fail")
    every = tab.page.get_by_role("button", name="discard…", exact=True)
    await tab.answer(every, "Discard 3 dead letters?", "Discard", "3 dead letters discarded")
    assert sorted(await world.dead_letters()) == ["DISCARDED"] * 3 + ["PENDING"]
    await in_audit_log(
        tab,
        ("discard dead letters", "all with task_name test:Fail", "3 discarded, 0 refused"),
        ("retry dead letters", "1", "1 submitted again, 0 refused"),
        ("run schedule now", schedule, "task "),
        ("resume schedules", schedule, "1 changed"),
        ("pause schedules", schedule, "1 changed"),
    )
    assert not tab.errors


async def _failures(world: World, number: int) -> int:
    assert world.system.task_db is not None
    async with world.system.task_db as db:
        [dead_letter] = await db.search(status=None, limit=1, after_id=number - 1)
    return 1 + len(dead_letter["history"])


async def test_a_reader_can_see_all_pages_and_change_nothing(world: World, redis: Redis, browser: Any) -> None:
    [held] = await runs(redis, "test:Hold")
    sent: dict[str, Any] = {
        "task": held.task_id,
        "queue": "realtime:large",
        "key": held.locks[0] if held.locks else "",
        "schedule": "test:Tidy/lhcb",
        "dead_letter": "1",
    }
    async with tab_of(browser, world.app, READER) as tab:
        await expect(tab.page.get_by_text("read-only", exact=True)).to_be_visible()
        for address in [*ADDRESSES, "/queues/realtime:large", "/dead-letters/1"]:
            await tab.open(address)
            posting = tab.page.locator('form[method="post"]:not([action$="/sign-out"]):has(button)')
            await expect(posting).to_have_count(0)
        refused = {action.path: await tab.is_refused(action.path, **sent) for action in ACTIONS}
    assert all(refused.values()), refused
    assert await read_audit(redis) == []
    assert await runs(redis, "test:Hold")
    assert await redis.xlen("diracx:tasks:realtime:large") == 1
    assert set(await world.dead_letters()) == {"PENDING"}


async def test_without_javascript_all_pages_can_be_read_and_everything_can_be_done(
    world: World, redis: Redis, browser: Any
) -> None:
    [held] = await runs(redis, "test:Hold")
    async with tab_of(browser, world.app, WRITER, scripts=False) as tab:
        page = tab.page
        for address in ADDRESSES:
            await page.goto(tab.home + address)
            await expect(page.get_by_role("heading", level=1)).to_be_visible()
            if address not in ("/dead-letters", "/configuration"):
                await expect(page.get_by_text("as of ")).to_be_visible()
                await expect(page.get_by_role("link", name="Reload")).to_be_visible()
        await page.goto(tab.home + "/")
        await expect(page.locator("noscript p").first).to_be_visible()
        await expect(page.locator("noscript p").first).to_contain_text("Charts need JavaScript")

        await page.goto(tab.home + "/running")
        await page.locator(f'[id="cancel-{held.task_id}"]').click()
        await expect(page.get_by_role("heading", name="Cancel this task?")).to_be_visible()
        await page.get_by_role("link", name="Go back").click()
        assert await runs(redis, "test:Hold")
        await page.locator(f'[id="cancel-{held.task_id}"]').click()
        await page.get_by_role("button", name="Cancel it").click()
        await expect(page.get_by_role("status")).to_contain_text(f"Cancelled: {held.task_id}")

        await page.goto(tab.home + "/dead-letters")
        await page.get_by_label("Select number 1").check()
        await page.get_by_role("button", name="Discard selected").click()
        await page.get_by_role("button", name="Discard", exact=True).click()
        await expect(page.get_by_role("status")).to_contain_text("1 dead letter discarded")
    assert (await world.dead_letters()).count("DISCARDED") == 1
    assert [entry.action for entry in await read_audit(redis)] == ["discard dead letters", "cancel tasks"]
