"""Dashboard pages: data, escaping of hostile text, and actions."""

from __future__ import annotations

import asyncio
import html
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from diracx.tasks import operations as monitor
from diracx.tasks.operations import Point
from diracx.tasks.operations.audit import read_audit
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.plumbing.broker.labels import LABEL_SECRET
from diracx.tasks.plumbing.broker.models import TaskMessage
from diracx.tasks.plumbing.persistence import DeadLetter, DeadLetterReason
from diracx.tasks.web.context import Load
from diracx.tasks.web.dashboard.pages import PAGES
from diracx.tasks.web.dashboard.pages.overview import load_of
from support.dashboard_world import HOSTILE, SECRET, WRITER, Tidy, World, small_world
from support.waiting import until

LARGEST = 300_000
ADDRESSES = [page.path for page in PAGES if "{" not in page.path and page.path != "/locks/one"]


@pytest.fixture
async def world(redis_url: str) -> AsyncIterator[World]:
    async with small_world(redis_url) as made:
        yield made


@asynccontextmanager
async def operator(world: World) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(world.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8790") as client:
        await client.post("/sign-in", data={"credential": WRITER})
        yield client


async def ask(client: httpx.AsyncClient, path: str, **fields: Any) -> tuple[str, dict[str, list[str]]]:
    """Press a button; return the question, and the form data of its confirmation."""
    token = re.search(r'name="form_token" value="(\w+)"', (await client.get("/audit")).text)
    assert token
    question = await client.post(path, data={"form_token": token[1], "next": "/audit", **fields})
    assert question.status_code == 200, question.text
    form: dict[str, list[str]] = {}
    requested = question.text[question.text.find('class="confirmation"') :]
    for name, value in re.findall(r'<input type="hidden" name="([^"]*)" value="([^"]*)">', requested):
        form.setdefault(html.unescape(name), []).append(html.unescape(value))
    return html.unescape(requested), form or {
        "form_token": [token[1]],
        "next": ["/audit"],
        **fields,
        "confirmed": ["yes"],
    }


async def act(client: httpx.AsyncClient, path: str, **fields: Any) -> str:
    """Press a button, confirm, and return the message of the next page."""
    return await say_yes(client, path, (await ask(client, path, **fields))[1])


async def say_yes(client: httpx.AsyncClient, path: str, form: dict[str, list[str]]) -> str:
    """Answer a question, and return the message of the next page."""
    done = await client.post(path, data=form)
    assert done.status_code == 303, done.text
    message = re.search(
        r'class="note (good|bad)" role="status">(.*?)</p>', (await client.get("/audit")).text, re.DOTALL
    )
    assert message
    return f"{message[1]}: {message[2]}"


async def test_every_page_shows_its_data_and_escapes_it(world: World) -> None:
    async with operator(world) as client:
        running = (await monitor.running(world.system.broker.redis)).items
        lock = next(each for each in running if each.locks).locks[0]
        [group] = await monitor.groups(world.system.broker.redis)
        addresses = [
            *ADDRESSES,
            "/queues/realtime:large",
            "/dead-letters/1",
            "/dead-letters/" + "0" * 32,
            f"/groups/{group.group_id}",
            "/delayed?reason=retry",
            "/failures?task=test:Fail",
            "/tasks?window=day&order=slow",
            "/configuration?task=test:Fail",
            "/schedules?vo=lhcb",
        ]
        for address in addresses:
            response = await client.get(address)
            assert response.status_code == 200, f"{address}: {response.text}"
            harmless(response.text, address)
        response = await client.get("/locks/one", params={"key": lock})
        assert response.status_code == 200
        harmless(response.text, "/locks/one")
        assert "test:</span>HoldSite" in response.text
        for address, shown in {
            "/running": "window.hacked",
            "/queues/realtime:large": "window.hacked",
            "/delayed": "window.hacked",
            "/failures": "window.hacked",
            "/dead-letters/1": "•••",
            "/schedules": "every 3600 s",
            "/": "no worker of size large runs",
        }.items():
            assert shown in (await client.get(address)).text, address


def harmless(text: str, address: str) -> None:
    assert len(text.encode()) < LARGEST, address
    assert SECRET not in text, address
    assert "<script>window" not in text, address
    assert "<img" not in text, address
    assert "\u202e" not in re.sub(r' value="[^"]*"', "", text), address  # it would reverse the text after it
    for attribute in re.findall(r'="([^"]*)"', text):
        assert "<" not in attribute, address


async def test_pages_of_unknown_objects_report_that(world: World) -> None:
    async with operator(world) as client:
        for address in (
            "/queues/normal:tiny",
            "/queues/normal:small?after=invalid",
            "/dead-letters/99",
            "/dead-letters?status=eaten",
            "/dead-letters?after=-1",
            "/groups/nothing",
            "/locks/one?key=leader",
            "/delayed?reason=boredom",
            *(
                f"{page}?after={after}"
                for page in (
                    "/delayed",
                    "/running",
                    "/failures",
                    "/queues/normal:small",
                    "/dead-letters",
                    "/audit",
                )
                for after in ("x", "nan", "1-x", "99999999999999999999-1", "-", "normal:small 1", "%D9%A3-1")
            ),
            "/queues/normal:small?after=diracx:tasks:normal:small%20x",
            "/audit?after=now",
            f"/dead-letters/{HOSTILE.replace('/', '%2F')}",
        ):
            response = await client.get(address)
            assert response.status_code in (200, 404), f"{address}: {response.status_code}"
            harmless(response.text, address)


def test_the_load_is_of_the_past_hour_or_the_observed_part_of_it() -> None:
    begin = datetime(2030, 1, 1, tzinfo=UTC)
    minutes = [None, 5, 6, 7]
    points = [
        Point(at=begin + timedelta(minutes=number), submitted=0, done=0, failed=0, backlog=backlog)
        for number, backlog in enumerate(minutes)
    ]
    at = begin.timestamp()
    drawn = load_of(points, [Load(at - 3600, 90, 90), Load(at + 121, 2, 1), Load(at + 123, 2, 2)])
    assert [moment - at for moment in drawn["t"]] == [60, 121, 123, 180]
    assert {each["label"]: each["values"] for each in drawn["series"]} == {
        "waiting": [None, 2, 2, None],
        "running": [None, 1, 2, None],
        "both": [5, 3, 4, 7],
    }
    assert load_of(points[:1], [])["t"] == []


async def test_no_page_grows_too_large_however_much_there_is(world: World) -> None:
    class Many(Tidy):
        """One of many."""

    for number in range(400):
        world.system.registry[f"many:Tidy{number:03}"] = type(f"Tidy{number:03}", (Many,), {})
    async with operator(world) as client:
        for address in ADDRESSES:
            response = await client.get(address)
            assert response.status_code == 200, response.text
            assert len(response.content) < LARGEST, f"{address}: {len(response.content)}"
        first = (await client.get("/schedules")).text
        assert "100 of 802 schedules" in first
        [following] = re.findall(r'href="([^"]+)" rel="next"', first)
        assert "Tidy050" in (await client.get(html.unescape(following))).text
        assert "Tidy050" not in first


async def test_dead_letters_are_submitted_again_and_discarded_one_by_one_and_all_at_once(world: World) -> None:
    async with operator(world) as client:
        assert "1 dead letter discarded" in await act(client, "/dead-letters/discard", dead_letter="1")
        assert sorted(await world.dead_letters()) == ["DISCARDED", "PENDING", "PENDING", "PENDING"]
        message = await act(client, "/dead-letters/retry", scope="all", task="test:Fail")
        assert "2 dead letters submitted again" in message
        assert message.startswith("good")

        async def stored_again() -> bool:
            return (await world.dead_letters()).count("PENDING") == 3

        await until(stored_again)
        assert "bad: " in await act(client, "/dead-letters/retry", dead_letter="1")  # it was discarded
        assert "3 dead letters discarded" in await act(client, "/dead-letters/discard", scope="all")


async def test_a_running_task_is_cancelled(world: World) -> None:
    redis = world.system.broker.redis
    [held] = [task for task in (await monitor.running(redis)).items if task.task_name == "test:HoldSite"]
    async with operator(world) as client:
        assert "running" in await act(client, "/tasks/cancel", task=held.task_id)
    result = await world.system.result(held.task_id, 20)
    assert result.error is not None


async def test_the_confirmation_of_a_cancellation_names_the_task_and_its_state(world: World) -> None:
    async with operator(world) as client:
        for page, reported in {
            "/running": "test:HoldSite, running at ",
            "/delayed": "test:Flaky, delayed (retry) for normal:medium",
            "/queues/realtime:large": "test:Urgent, waiting in realtime:large",
        }.items():
            text = (await client.get(page)).text
            forms = re.findall(r'<form[^>]*action="/tasks/cancel".*?</form>', text, re.DOTALL)
            fields = [dict(re.findall(r'name="(\w+)" value="([^"]*)"', form)) for form in forms]
            sent = next(each for each in fields if html.unescape(each["about"]).startswith(reported))
            requested, _ = await ask(
                client, "/tasks/cancel", task=sent["task"], about=html.unescape(sent["about"])
            )
            assert f"{sent['task']}: {reported}" in requested


async def test_a_queue_is_purged_and_a_lock_released(world: World) -> None:
    redis = world.system.broker.redis
    async with operator(world) as client:
        assert "1 tasks were cancelled" in await act(client, "/queues/purge", queue="realtime:large")
        assert await redis.xlen("diracx:tasks:realtime:large") == 0
        [held] = [task for task in (await monitor.running(redis)).items if task.locks]
        assert "Released: 1" in await act(client, "/locks/release", key=held.locks[0])


async def test_a_confirmed_release_takes_the_lock_only_from_the_holders_that_were_shown(world: World) -> None:
    key, field = "limiter:conc:dashboard_site:Y", "/locks/release"
    redis = world.system.broker.redis

    async def hold(*owners: str) -> None:
        await redis.delete(key)
        await redis.zadd(key, {owner: (time.time() + 600) * 1e6 for owner in owners})

    async def held() -> list[str]:
        return sorted(owner.decode() for owner in await redis.zrange(key, 0, -1))

    async with operator(world) as client:
        await hold("seen", "other")
        text, form = await ask(client, field, key=key)
        assert "seen" in text
        assert "other" in text
        await hold("seen", "unseen")
        assert "Released: 1, from seen." in await say_yes(client, field, form)
        assert await held() == ["unseen"]
        assert "released meanwhile" in await say_yes(client, field, form)
        assert await held() == ["unseen"]
        await hold("seen", "other")
        text, form = await ask(client, field, key=key, owner="seen")
        assert "other" not in text
        assert "from seen" in await say_yes(client, field, form)
        assert await held() == ["other"]


async def test_schedules_are_paused_resumed_and_run(world: World) -> None:
    async with operator(world) as client:
        assert "test:Tidy/lhcb paused" in await act(client, "/schedules/pause", schedule="test:Tidy/lhcb")
        assert "paused" in (await client.get("/schedules?vo=lhcb")).text
        assert "resumed" in await act(client, "/schedules/resume", schedule="test:Tidy/lhcb")
        assert "Submitted: " in await act(client, "/schedules/run-now", schedule="test:Tidy/lhcb")
        assert "no schedule" in await act(client, "/schedules/pause", schedule="test:None")


async def test_a_server_that_refuses_tasks_is_an_error_503_of_the_dashboard(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with operator(world) as client:
        _, form = await ask(client, "/dead-letters/retry", dead_letter="1")
        await world.refuse(monkeypatch)
        response = await client.post("/dead-letters/retry", data=form)
        assert response.status_code == 503, response.text
        assert "cannot submit 1 dead letters again" in response.text


async def test_the_audit_log_shows_users_and_actions(world: World) -> None:
    async with operator(world) as client:
        await act(client, "/schedules/pause", schedule="test:Tidy/lhcb")
        await act(client, "/dead-letters/discard", dead_letter="1")
        page = (await client.get("/audit")).text
    entries = await read_audit(world.system.broker.redis)
    assert [(entry.who, entry.action, entry.target) for entry in entries] == [
        ("wilma", "discard dead letters", "1"),
        ("wilma", "pause schedules", "test:Tidy/lhcb"),
    ]
    assert page.index("discard dead letters") < page.index("pause schedules")


async def test_a_live_page_is_sent_again_after_a_change(world: World) -> None:
    scope_ended = asyncio.Event()
    async with operator(world) as client:
        cookie = "; ".join(f"{name}={value}" for name, value in client.cookies.items())
    received: list[str] = []

    async def receive() -> dict[str, Any]:
        await scope_ended.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        received.append(message.get("body", b"").decode())

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/live/queues",
        "raw_path": b"/live/queues",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"localhost:8790"), (b"cookie", cookie.encode())],
        "server": ("localhost", 8790),
        "client": ("127.0.0.1", 1),
        "state": {},
    }
    following = asyncio.create_task(world.app(scope, receive, send))  # type: ignore[arg-type]

    async def first() -> bool:
        return "event: fragment" in "".join(received)

    await until(first)
    await world.system.broker.redis.xtrim("diracx:tasks:realtime:large", maxlen=0)

    async def second() -> bool:
        return "".join(received).count("event: fragment") >= 2

    await until(second)
    world.app.end_streams()
    scope_ended.set()
    await asyncio.wait_for(following, 10)


async def test_pending_dead_letters_are_shown_escaped_and_without_secrets(world: World) -> None:
    message = TaskMessage(
        task_id="e" * 32,
        task_name="test:Fail",
        task_args=[HOSTILE, SECRET],
        labels={LABEL_SECRET: [1]},
    )
    dead_letter = DeadLetter.of_message(message, DeadLetterReason.EXHAUSTED, HOSTILE, "stream/1-0")
    redis = world.system.broker.redis
    await redis.xadd(keys.DEAD_LETTERS, dead_letter.to_stored())
    await redis.xadd(keys.DEAD_LETTERS, {"reason": "unparsable", "data": b"no dead letter"})
    page = await monitor.waiting_dead_letters(redis, 1)
    assert [each.task_id for each in page.items] == ["e" * 32]
    [last] = (await monitor.waiting_dead_letters(redis, 1, page.after)).items
    assert (last.reason, last.arguments) == ("unparsable", None)

    async def seen() -> bool:
        return (await world.context.snapshot()).dead_letters_waiting == 2

    await until(seen)
    async with operator(world) as client:
        text = (await client.get("/dead-letters")).text
    assert "2 dead letters wait in Redis" in text
    assert "eeeeeeeeeeee…" in text
    assert SECRET not in text
    assert "<script>window" not in text
    assert html.escape("<script>window.hacked=1") in text
