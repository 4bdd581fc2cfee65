"""Dashboard pages about pilots, and actions on compute elements."""

from __future__ import annotations

import html
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from diracx.tasks.operations.audit import read_audit
from diracx.tasks.plumbing.broker import RedisStreamBroker
from diracx.tasks.plumbing.config.reader import ConfigReader
from diracx.tasks.plumbing.registry import TaskRegistry
from diracx.tasks.web.auth.backends import Principal, Role, TokenBackend
from diracx.tasks.web.context import AppContext
from diracx.tasks.web.dashboard import DashboardApp
from redis.asyncio import Redis

from gubbins.dashboard import extension
from gubbins.db.sql import MyPilotDB
from gubbins.db.sql.outputs import Output
from gubbins.domain import clock
from gubbins.domain.circuit_breaker import CECall
from gubbins.domain.pilot_states import MyPilotStatus, PilotOutcome
from gubbins.logic import my_pilots as logic

HOSTILE = "<script>window.hacked=1</script>\"'>"


@pytest.fixture
async def client(
    db: MyPilotDB, tables_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[httpx.AsyncClient]:
    monkeypatch.setenv("DIRACX_DB_URL_MYPILOTDB", tables_url)
    await db.add_ce("ce01", 5, 1.0)
    await db.add_ce(HOSTILE, 2, 1.0)
    for ce, vo in (("ce01", "lhcb"), ("ce01", "gridpp"), (HOSTILE, "lhcb")):
        await db.submit_pilot(ce, vo)
    await db.record_ce_error("ce01", HOSTILE)
    async with signed_in(redis_url) as made:
        yield made


@asynccontextmanager
async def signed_in(redis_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an operator who is signed in to a dashboard with the pages of pilots."""
    broker = RedisStreamBroker(redis_url)

    async def context() -> AppContext:
        return AppContext(broker, TaskRegistry.of({}), ConfigReader())

    backend = TokenBackend({"the-token-of-wilma": Principal("wilma", Role.WRITE, None)}, "")
    app = DashboardApp(context, backend, extensions=[extension()])
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
        response = await client.get(address)
        assert response.status_code == 200, response.text
        for text in shown:
            assert text in response.text, f"{address}: {text}"
        assert "<script>window" not in response.text
        assert len(response.content) < 300_000
    for address in ("/pilots/99", "/pilots/x", "/pilots/list?status=LOST", "/pilots/list?page=0"):
        assert (await client.get(address)).status_code == 404, address


async def test_a_compute_element_shows_how_many_pilots_wait_there_for_what(
    client: httpx.AsyncClient, db: MyPilotDB
) -> None:
    await db.set_waiting_reasons([(1, "Slurm: JobHeldAdmin"), (2, "Slurm: JobHeldAdmin"), (3, HOSTILE)])
    text = (await client.get("/pilots")).text
    assert "2 wait: Slurm: JobHeldAdmin" in text
    assert "1 wait: &lt;script&gt;" in text
    assert "<script>window" not in text
    assert "Slurm: JobHeldAdmin" in (await client.get("/pilots/1")).text


async def test_stale_pilots_and_those_without_work_are_shown_apart(
    client: httpx.AsyncClient, db: MyPilotDB
) -> None:
    await db.add_secrets(dict.fromkeys((1, 2), "0" * 64))
    await db.advance_pilots({MyPilotStatus.RUNNING: [(1, None)]}, vo="lhcb")
    await db.record_heartbeat(1, starts=0, stale_after=timedelta(days=-1), reported={"host": HOSTILE})
    idle = {"outcome": PilotOutcome.NO_WORK, "detail": HOSTILE}
    await db.record_heartbeat(2, starts=0, stale_after=timedelta(days=-1), reported=idle)
    for status in (MyPilotStatus.RUNNING, MyPilotStatus.DONE):
        await db.advance_pilots({status: [(2, None)]}, vo="gridpp")
    overview = (await client.get("/pilots")).text
    assert re.search(r"gridpp</th>.*?100\s*%|100\s*%", overview, re.DOTALL)
    stale = (await client.get("/pilots/list?status=stale")).text
    assert "1 pilots" in stale
    assert '<span class="warn">stale</span>' in stale
    assert ">stale<" in (await client.get("/pilots/1")).text
    ended = (await client.get("/pilots/2")).text
    assert "reported by the pilot: no work" in ended
    assert not [page for page in (overview, stale, ended) if "<script>window" in page]


async def test_a_compute_element_that_failed_too_often_shows_its_circuit(
    client: httpx.AsyncClient, db: MyPilotDB
) -> None:
    assert "submit paused" not in (await client.get("/pilots")).text
    for call, pause in ((CECall.SUBMIT, 3600), (CECall.STATUS, 1e-6)):
        await db.record_failure("ce01", call, HOSTILE, failures=1, pause_seconds=pause, max_pause_seconds=3600)
    text = (await client.get("/pilots")).text
    assert "submit paused for" in text
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
    entries = [(entry.who, entry.action, entry.target) for entry in await read_audit(redis)]
    assert entries == [
        ("wilma", "open compute element", "ce01"),
        ("wilma", "close compute element", "ce01"),
    ]


async def test_opening_or_closing_a_banned_compute_element_mentions_the_ban(
    client: httpx.AsyncClient, db: MyPilotDB
) -> None:
    found = re.search(r'name="form_token" value="(\w+)"', (await client.get("/pilots")).text)
    assert found
    form = {"form_token": found[1], "ce": "ce01", "next": "/pilots"}
    for action in ("open", "close"):
        assert "banned" not in (await client.post(f"/pilots/ce/{action}", data=form)).text
    await db.ban_ce("ce01", reason="drains for <good>")
    for action, reported in (("open", "Opening lifts the ban"), ("close", "Closing lifts the ban")):
        text = (await client.post(f"/pilots/ce/{action}", data=form)).text
        assert "It is banned: drains for &lt;good&gt;. " + reported in text
    assert (await db.get_ce("ce01"))["banned_at"]


async def test_a_compute_element_is_banned_with_a_reason_and_opened_again(
    client: httpx.AsyncClient, db: MyPilotDB, redis: Redis
) -> None:
    found = re.search(r'name="form_token" value="(\w+)"', (await client.get("/pilots")).text)
    assert found
    form = {"form_token": found[1], "ce": "ce01", "next": "/pilots"}
    question = (await client.post("/pilots/ce/ban", data=form)).text
    assert "Ban ce01?" in question
    assert 'name="reason" required' in question
    await client.post("/pilots/ce/ban", data=form | {"confirmed": "yes", "reason": "  "})
    assert (await db.get_ce("ce01"))["banned_at"] is None
    assert "A ban needs a reason" in (await client.get("/pilots")).text
    await client.post("/pilots/ce/ban", data=form | {"confirmed": "yes", "reason": HOSTILE})
    assert (await db.get_ce("ce01"))["ban_reason"] == HOSTILE
    text = (await client.get("/pilots")).text
    assert "banned, &lt;script&gt;" in text
    assert "<script>window" not in text
    await client.post("/pilots/ce/close", data=form | {"confirmed": "yes"})
    ce = await db.get_ce("ce01")
    assert (ce["banned_at"], ce["enabled"]) == (None, False)
    entries = [(entry.action, entry.target, entry.ok) for entry in await read_audit(redis)]
    assert entries == [("close compute element", "ce01", True), ("ban compute element", "ce01", True)]


async def test_only_a_downtime_of_the_named_compute_element_is_ended(
    client: httpx.AsyncClient, db: MyPilotDB, redis: Redis
) -> None:
    found = re.search(r'name="form_token" value="(\w+)"', (await client.get("/pilots")).text)
    assert found
    now = clock.now()
    planned = await logic.add_downtime(db, "ce01", now, now + timedelta(hours=1), "new switches", by="alice")
    form = {"form_token": found[1], "downtime": str(planned.id), "next": "/pilots", "confirmed": "yes"}
    for ce, left in ((HOSTILE, [planned]), ("ce01", [])):
        await client.post("/pilots/ce/downtime/end", data=form | {"ce": ce})
        assert await logic.list_downtimes(db) == left
    entries = [(entry.action, entry.target) for entry in await read_audit(redis) if entry.ok]
    assert entries == [("remove downtime", "ce01")]


async def test_any_number_of_compute_elements_is_paged_and_filtered(
    client: httpx.AsyncClient, db: MyPilotDB
) -> None:
    names = [f"ce-{number:03}.site-with-a-rather-long-name.example.org" for number in range(130)]
    for name in names:
        await db.add_ce(name, 5, 1.0, enabled=not name.startswith("ce-12"))
        await db.submit_pilot(name, "gridpp") if not name.startswith("ce-12") else None
    await db.ban_ce(names[7], reason="flood")
    seen: list[str] = []
    address: str | None = "/pilots"
    while address:
        response = await client.get(address)
        assert len(response.content) < 200_000  # scripts and styles come on top
        table, _, pilots = response.text.rpartition("<h2>Pilots</h2>")
        seen += re.findall(r'<th scope="row" class="nowrap"><a [^>]*>(ce-[^<]+)</a>', table)
        following = re.search(
            r'href="([^"]+)" rel="next">Next page<span class="unseen"> of the comp', response.text
        )
        address = html.unescape(following[1]) if following else None
    assert seen == names
    assert "60 of 123 rows" in pilots
    for query, wanted in {
        "ce=CE-01": names[10:20],
        "ce=ce-&state=closed": names[120:],
        "state=banned": [names[7]],
        "state=failing": [],
        "ce=nowhere": [],
    }.items():
        text = (await client.get(f"/pilots?{query}")).text
        assert re.findall(r'<th scope="row" class="nowrap"><a [^>]*>(ce-[^<]+)</a>', text) == wanted, query
    assert "10 of 10 rows" in (await client.get("/pilots?ce=CE-01")).text
    second = (await client.get("/pilots?rows=60")).text
    assert "First page<span" in second
    assert names[0] not in second.rpartition("<h2>Pilots</h2>")[2]
    for query in ("state=lost", "rows=-1", "rows=x"):
        assert (await client.get(f"/pilots?{query}")).status_code == 404, query


async def test_output_of_a_pilot_is_cut_and_escaped(client: httpx.AsyncClient, db: MyPilotDB) -> None:
    now = datetime.now(UTC)
    await db.update_pilot_status(1, MyPilotStatus.RUNNING)
    await db.update_pilot_status(1, MyPilotStatus.DONE)
    much = "the beginning\n" + HOSTILE * 20_000 + "\n\0\x1b[31mthe end, https://user:hunter2@se.example.org/"
    await db.queue_outputs([1])
    await db.store_outputs([Output(1, now + timedelta(days=1), much, "")])
    assert "/pilots/1/output" in (await client.get("/pilots/1")).text
    response = await client.get("/pilots/1/output")
    assert len(response.content) < 200_000
    assert "the end, https://user:***@se.example.org/" in response.text
    for hidden in ("the beginning", "<script>window", "hunter2"):
        assert hidden not in response.text
    assert f"{len(much):,}" in response.text
    assert "Empty." in response.text
    await db.queue_outputs([2])
    await db.store_outputs([Output(2, now + timedelta(days=1), error=HOSTILE)])
    response = await client.get("/pilots/2/output")
    assert "There is no output: &lt;script&gt;" in response.text
    await db.ban_ce(HOSTILE, reason=None)
    assert "The output cannot be fetched now" in (await client.get("/pilots/3/output")).text
    assert (await client.get("/pilots/99/output")).status_code == 404


async def test_without_a_database_the_page_reports_it(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIRACX_DB_URL_MYPILOTDB", raising=False)
    async with signed_in(redis_url) as made:
        response = await made.get("/pilots")
    assert response.status_code == 503
    assert "DIRACX_DB_URL_MYPILOTDB" in response.text
