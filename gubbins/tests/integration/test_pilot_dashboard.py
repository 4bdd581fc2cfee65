"""The pages about pilots show what the database says, and open and close compute elements."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from diracx.tasks.dashboard import create_app
from diracx.tasks.dashboard.access import Account, Role, TokenGate, digest_of
from diracx.tasks.dashboard.installation import Installation
from diracx.tasks.monitor.audit import read_audit
from diracx.tasks.plumbing.broker import RedisStreamBroker
from diracx.tasks.plumbing.config_source import ConfigReader
from diracx.tasks.plumbing.factory import TaskRegistry
from redis.asyncio import Redis

from gubbins.circuits import CECall
from gubbins.dashboard import extension
from gubbins.dashboard.store import course_of
from gubbins.db.sql import MyPilotDB

HOSTILE = "<script>window.hacked=1</script>\"'>"


@pytest.fixture
async def client(
    db: MyPilotDB, db_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[httpx.AsyncClient]:
    monkeypatch.setenv("DIRACX_DB_URL_MYPILOTDB", db_url)
    await db.add_ce("ce01", 5, 1.0)
    await db.add_ce(HOSTILE, 2, 1.0)
    for ce, vo in (("ce01", "lhcb"), ("ce01", "gridpp"), (HOSTILE, "lhcb")):
        await db.submit_pilot(ce, vo)
    await db.record_ce_error("ce01", HOSTILE)
    broker = RedisStreamBroker(redis_url)

    async def installation() -> Installation:
        return Installation(broker, TaskRegistry.of({}), ConfigReader())

    gate = TokenGate([Account("wilma", Role.WRITE, digest_of("the-token-of-wilma"))], "")
    app = create_app(installation, gate, extensions=[extension()])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as made:
        await made.post("/sign-in", data={"credential": "the-token-of-wilma"})
        yield made
    await app.aclose()
    await broker.shutdown()


async def test_pilots_are_shown_by_vo_compute_element_and_state_and_one_by_one(client: httpx.AsyncClient) -> None:
    for address, shown in {
        "/pilots": ["ce01", "lhcb", "gridpp", "2 / 5", "all VOs"],
        "/pilots?vo=lhcb": ["ce01"],
        "/pilots/list?status=SUBMITTED": ["3 pilots"],
        "/pilots/list?vo=gridpp&ce=ce01": ["1 pilots"],
        "/pilots/1": ["submitted", "ce01", "History"],
    }.items():
        answer = await client.get(address)
        assert answer.status_code == 200, answer.text
        for text in shown:
            assert text in answer.text, f"{address}: {text}"
        assert "<script>window" not in answer.text
        assert len(answer.content) < 300_000
    for address in ("/pilots/99", "/pilots/x", "/pilots/list?status=LOST", "/pilots/list?page=0"):
        assert (await client.get(address)).status_code == 404, address


async def test_a_compute_element_that_failed_too_often_shows_its_circuit(
    client: httpx.AsyncClient, db: MyPilotDB
) -> None:
    assert "submit open" not in (await client.get("/pilots")).text
    for call, pause in ((CECall.SUBMIT, 3600), (CECall.STATUS, 1e-6)):
        await db.record_failure("ce01", call, HOSTILE, failures=1, pause_seconds=pause, max_pause_seconds=3600)
    text = (await client.get("/pilots")).text
    assert "submit open for" in text
    assert "status half-open" in text
    await db.ban_ce("ce01", reason=HOSTILE)
    text = (await client.get("/pilots")).text
    assert ">banned<" in text
    assert "<script>window" not in text


async def test_a_compute_element_is_closed_and_opened_and_that_is_written_down(
    client: httpx.AsyncClient, db: MyPilotDB, redis: Redis
) -> None:
    found = re.search(r'name="form_token" value="(\w+)"', (await client.get("/pilots")).text)
    assert found
    form = {"form_token": found[1], "ce": "ce01", "next": "/pilots"}
    assert "Close ce01 for new pilots?" in (await client.post("/pilots/ce/close", data=form)).text
    assert (await db.get_ce("ce01"))["enabled"]
    await client.post("/pilots/ce/close", data=form | {"confirmed": "yes"})
    assert not (await db.get_ce("ce01"))["enabled"]
    assert "ce01: closed." in (await client.get("/pilots")).text
    await client.post("/pilots/ce/open", data=form | {"confirmed": "yes"})
    assert (await db.get_ce("ce01"))["enabled"]
    told = [(entry.who, entry.action, entry.target) for entry in await read_audit(redis)]
    assert told == [("wilma", "open compute element", "ce01"), ("wilma", "close compute element", "ce01")]


async def test_whoever_opens_or_closes_a_banned_compute_element_is_told_of_the_ban(
    client: httpx.AsyncClient, db: MyPilotDB
) -> None:
    found = re.search(r'name="form_token" value="(\w+)"', (await client.get("/pilots")).text)
    assert found
    form = {"form_token": found[1], "ce": "ce01", "next": "/pilots"}
    for deed in ("open", "close"):
        assert "banned" not in (await client.post(f"/pilots/ce/{deed}", data=form)).text
    await db.ban_ce("ce01", reason="drains for <good>")
    for deed, told in (("open", "Opening lifts the ban"), ("close", "Closing lifts the ban")):
        text = (await client.post(f"/pilots/ce/{deed}", data=form)).text
        assert "It is banned: drains for &lt;good&gt;. " + told in text
    assert (await db.get_ce("ce01"))["banned_at"]


async def test_without_a_database_the_page_says_so(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIRACX_DB_URL_MYPILOTDB", raising=False)
    broker = RedisStreamBroker(redis_url)

    async def installation() -> Installation:
        return Installation(broker, TaskRegistry.of({}), ConfigReader())

    gate = TokenGate([Account("wilma", Role.WRITE, digest_of("the-token-of-wilma"))], "")
    app = create_app(installation, gate, extensions=[extension()])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as made:
        await made.post("/sign-in", data={"credential": "the-token-of-wilma"})
        answer = await made.get("/pilots")
    assert answer.status_code == 503
    assert "DIRACX_DB_URL_MYPILOTDB" in answer.text
    await app.aclose()
    await broker.shutdown()


def test_the_chart_counts_pilots_in_the_quarters_of_an_hour_in_which_they_held_a_slot() -> None:
    now = datetime(2030, 1, 2, 12, 0, tzinfo=UTC)

    def pilot(status: str, *minutes_ago: int | None) -> dict[str, Any]:
        times = [None if minutes is None else now - timedelta(minutes=minutes) for minutes in minutes_ago]
        names = ("submitted_at", "started_at", "ended_at")
        return {"vo": "lhcb", "ce_name": "ce", "status": status, **dict(zip(names, times, strict=True))}

    course = course_of(
        [
            pilot("SUBMITTED", 5, None, None),
            pilot("RUNNING", 50, 35, None),
            pilot("FAILED", 50, 35, 20),
            pilot("DONE", 3000, 2900, 2800),
        ],
        now,
    )
    series = {each["label"]: each["values"] for each in course.charts["slots"]["series"]}
    assert series["running"][-4:] == [0, 2, 1, 1]
    assert series["submitted"][-4:] == [2, 0, 0, 1]
    assert (course.ended, course.failed) == ({"ce": 1}, {"ce": 1})
    flow = {each["label"]: sum(each["values"]) for each in course.charts["flow"]["series"]}
    assert flow == {"submitted": 3, "done": 0, "failed": 1}
