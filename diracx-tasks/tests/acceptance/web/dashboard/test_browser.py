"""The dashboard in a real browser: security, accessibility and live updates."""

from __future__ import annotations

from typing import Any

import pytest
from diracx.tasks import operations as monitor
from diracx.tasks.operations.audit import read_audit
from diracx.tasks.plumbing.broker.models import Submission, TaskMessage
from diracx.tasks.web.dashboard.pages import PAGES
from redis.asyncio import Redis
from support.dashboard_browser import Tab, expect, needs_chromium
from support.dashboard_world import Urgent, World
from support.waiting import until

pytestmark = [needs_chromium, pytest.mark.asyncio(loop_scope="module")]
#: Keeps the streams that a page opens, and the fragments that came, each before the page has seen it.
WATCH_STREAMS = """
window.streams = [];
window.fragments = [];
const Known = EventSource;
window.EventSource = class extends Known {
  constructor(url) {
    super(url);
    streams.push(this);
    this.addEventListener("fragment", (event) => fragments.push(event.data));
  }
};
"""
#: The backlog of realtime:large in the last fragment that came.
BACKLOG_THAT_CAME = """
[...new DOMParser().parseFromString(fragments.at(-1) ?? "", "text/html").querySelectorAll("tr")]
  .find((row) => /realtime:large/.test(row.querySelector("th").textContent))
  ?.querySelector("td").textContent
"""
ADDRESSES = [page.path for page in PAGES if "{" not in page.path and page.path != "/locks/one"]


async def test_every_page_is_safe_small_and_accessible(tab: Tab, world: World) -> None:
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
        await tab.check(address)
    await tab.page.goto(f"{tab.home}/locks/one")
    await tab.page.goto(tab.home + "/locks")
    await tab.page.get_by_role("link", name=lock[:30]).first.click()
    await tab.page.get_by_role("button", name="Release lock").wait_for()
    unforeseen = [text for text in tab.errors if "404" not in text]
    assert not unforeseen, unforeseen


async def test_a_page_updates_itself_and_can_be_paused(tab: Tab, world: World) -> None:
    await tab.page.add_init_script(WATCH_STREAMS)
    await tab.page.clock.install()
    await tab.open("/queues")
    row = tab.page.get_by_role("row", name="realtime:large")
    await expect(row.get_by_role("cell").first).to_have_text("1")
    await expect(tab.page.locator("#state")).to_have_text("live")
    await _submit(world, 1)
    await expect(row.get_by_role("cell").first).to_have_text("2")
    await tab.page.get_by_role("button", name="Pause").click()
    await _submit(world, 2)

    async def has_come() -> bool:
        return bool(await tab.page.evaluate(BACKLOG_THAT_CAME) == "3")

    await until(has_come)
    await tab.page.clock.run_for(1000)  # what is held is tried to be shown every 0.5 s
    await expect(row.get_by_role("cell").first).to_have_text("2")
    await tab.page.get_by_role("button", name="Resume").click()
    await expect(row.get_by_role("cell").first).to_have_text("3")


async def test_a_page_shows_live_only_while_connected_and_has_one_connection(tab: Tab, world: World) -> None:
    await tab.page.add_init_script(WATCH_STREAMS)
    await tab.page.clock.install()

    async def refuse(route: Any) -> None:
        await route.fulfill(status=503)

    state, stream = tab.page.locator("#state"), "**/live/queues"
    await tab.page.route(stream, refuse)
    async with tab.page.expect_response(stream):
        await tab.open("/queues")
    await tab.page.get_by_role("button", name="Pause").click()
    async with tab.page.expect_response(stream):  # it tries again while it is paused
        await expect(state).to_have_text("paused")
    async with tab.page.expect_response(stream):
        await tab.page.get_by_role("button", name="Resume").click()
        assert await state.text_content() != "live"
    await expect(state).to_have_text("no connection")
    await tab.page.unroute(stream, refuse)
    await _submit(world, 1)
    await tab.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    await expect(state).to_have_text("live")
    row = tab.page.get_by_role("row", name="realtime:large")
    await expect(row.get_by_role("cell").first).to_have_text("2")
    await tab.page.clock.run_for(5500)  # what was about to be tried again has been tried by then
    assert await tab.page.evaluate("streams.filter((one) => one.readyState !== EventSource.CLOSED).length") == 1
    await tab.page.route(stream, refuse)

    async def silence_is_noticed() -> bool:
        await tab.page.clock.run_for(41_000)  # as if no keep-alive event came: the connection was lost silently
        return bool(await state.text_content() == "no connection")

    await until(silence_is_noticed)


async def test_the_overview_draws_its_charts(tab: Tab) -> None:
    await tab.open("/")
    await expect(tab.page.locator("figure.chart canvas")).to_have_count(2)
    await expect(tab.page.get_by_role("img", name="Load, tasks in the queues; latest: waiting 1")).to_be_visible()
    assert not tab.errors


async def test_an_action_is_confirmed_in_a_dialog_and_works_by_keyboard(
    tab: Tab, world: World, redis: Redis
) -> None:
    await tab.open("/schedules?vo=lhcb")
    button = tab.page.get_by_role("button", name="Pause").last
    await tab.answer_by_keyboard(button, "Pause test:Tidy/lhcb?", "Pause")
    await expect(tab.page.get_by_role("status")).to_contain_text("test:Tidy/lhcb paused")
    await expect(tab.page.get_by_role("button", name="Resume")).to_be_visible()
    [entry] = await read_audit(redis)
    assert entry.action == "pause schedules"
    assert not tab.errors


async def test_several_dead_letters_are_chosen_and_discarded_at_once(tab: Tab, world: World) -> None:
    await tab.open("/dead-letters")
    discard = tab.page.get_by_role("button", name="Discard selected")
    await expect(discard).to_be_disabled()
    await tab.page.get_by_label("Select number 1").check()
    await tab.page.get_by_label("Select number 3").check()
    await expect(tab.page.get_by_text("2 selected")).to_be_visible()
    await discard.click()
    dialog = tab.page.get_by_role("dialog", name="Discard 2 dead letters?")
    await dialog.get_by_role("button", name="Discard").click()
    await expect(tab.page.get_by_role("status")).to_contain_text("2 dead letters discarded")

    async def decided() -> bool:
        return (await world.dead_letters()).count("DISCARDED") == 2

    await until(decided)
    assert not tab.errors


async def test_the_chosen_colours_are_kept_on_the_next_page(tab: Tab) -> None:
    await tab.open("/workers")
    await tab.page.get_by_role("button", name="Dark").click()
    await tab.open("/locks")
    assert await tab.page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert await tab.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 27)"


async def _submit(world: World, number: int) -> None:
    message = TaskMessage(task_id=f"{number:032x}", task_name=f"test:{Urgent.__name__}", task_args=["more"])
    await world.system.broker.submit([Submission(message, "diracx:tasks:realtime:large")])
