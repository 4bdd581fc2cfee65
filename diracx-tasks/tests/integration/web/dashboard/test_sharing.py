"""Shared queries of the dashboard, and its single initialisation."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from diracx.tasks.operations.single_flight import SingleFlightCache
from diracx.tasks.plumbing.broker import RedisStreamBroker
from diracx.tasks.plumbing.config.reader import ConfigReader
from diracx.tasks.web.auth.backends import Principal, Role
from diracx.tasks.web.context import AppContext
from diracx.tasks.web.dashboard import DashboardApp
from diracx.tasks.web.dashboard.page import Extension, Page, Request
from diracx.tasks.web.sse import StreamSettings
from support.databases import with_tables
from support.waiting import until

LONG = 3600.0


class Slow:
    """Responds on request, and counts the calls."""

    def __init__(self, *outcomes: object) -> None:
        self.outcomes = list(outcomes)
        self.asked = 0
        self.go_on = asyncio.Event()

    async def __call__(self, *_: object) -> Any:
        self.asked += 1
        await self.go_on.wait()
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


async def begun(*things: Awaitable[Any]) -> list[asyncio.Future[Any]]:
    """All of them, begun in this order."""
    futures = [asyncio.ensure_future(each) for each in things]
    for _ in range(5):
        await asyncio.sleep(0)
    return futures


async def test_concurrent_requests_for_the_same_key_share_one_response() -> None:
    shared, slow = SingleFlightCache(), Slow("response")
    waiting = await begun(*(shared.get("key", slow, LONG) for _ in range(20)))
    slow.go_on.set()
    assert await asyncio.gather(*waiting) == ["response"] * 20
    assert await shared.get("key", slow, LONG) == "response"
    assert slow.asked == 1


async def test_a_slow_response_does_not_delay_other_keys() -> None:
    shared, slow, quick = SingleFlightCache(), Slow("slow"), Slow("quick")
    [waiting] = await begun(shared.get("slow", slow, LONG))
    quick.go_on.set()
    assert await shared.get("quick", quick, LONG) == "quick"
    assert not waiting.done()
    slow.go_on.set()
    assert await waiting == "slow"


async def test_a_failure_is_raised_to_all_waiters_and_the_next_request_retries() -> None:
    shared, slow = SingleFlightCache(), Slow(ConnectionError("gone"), "back")
    waiting = await begun(*(shared.get("key", slow, LONG) for _ in range(3)))
    slow.go_on.set()
    assert [str(each) for each in await asyncio.gather(*waiting, return_exceptions=True)] == ["gone"] * 3
    assert await shared.get("key", slow, LONG) == "back"
    assert slow.asked == 2


async def test_a_cancelled_waiter_does_not_cancel_the_others() -> None:
    shared, slow = SingleFlightCache(), Slow("response")
    first, second = await begun(shared.get("key", slow, LONG), shared.get("key", slow, LONG))
    first.cancel()
    with suppress(asyncio.CancelledError):
        await first
    slow.go_on.set()
    assert await second == "response"
    assert slow.asked == 1


async def test_an_expired_response_is_dropped_and_fetched_again() -> None:
    shared, slow = SingleFlightCache(), Slow("response")
    slow.go_on.set()

    async def dropped() -> bool:
        return not shared._entries

    for asked in range(1, 4):
        await shared.get("key", slow, 0.001)
        assert slow.asked == asked
        await until(dropped)


class VoGate:
    """Accepts everyone; the secret is the VO."""

    credential, hint, takes_links, provider = "VO", "any", False, None

    async def sign_in(self, request: Request, credential: str) -> str | None:
        return credential

    async def principal(self, request: Request, secret: str) -> Principal | None:
        return Principal("wilma", Role.READ, secret)

    async def sign_out(self, secret: str) -> None: ...


@pytest.fixture
def context(redis_url: str) -> AppContext:
    return AppContext(RedisStreamBroker(redis_url), {}, ConfigReader())


def dashboard(context: AppContext, load: Any, templates: Path) -> DashboardApp:
    for name in ("counted.html", "_counted.html"):
        (templates / name).write_text("{{ number }}")
    page = Page("/counted", "counted", "Counted", load, per_vo=True)

    async def this() -> AppContext:
        return context

    extension = Extension(pages=[page], templates=templates)
    # Each stream looks once, and ends.
    return DashboardApp(this, VoGate(), extensions=[extension], stream=StreamSettings(max_seconds=0.001))


async def follow(app: DashboardApp, vo: str, query: str = "", path: str = "/live/counted") -> str:
    """Follow the fragments that a page, or its stream, sends."""
    headers = [(b"host", b"localhost"), (b"cookie", f"tasks-dashboard-http={vo}".encode())]
    scope = {"type": "http", "method": "GET", "path": path, "query_string": query.encode(), "headers": headers}
    scope |= {"scheme": "http", "server": ("localhost", 80), "root_path": "", "http_version": "1.1", "state": {}}
    sent: list[bytes] = []

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    await app(scope, receive, send)
    return b"".join(sent).decode()


async def test_readers_of_the_same_page_share_one_query(
    context: AppContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Slow({"number": 42})
    app = dashboard(context, load, tmp_path)
    requested = 0
    get = context.responses.get

    async def counted(*args: Any) -> Any:
        nonlocal requested
        requested += 1
        return await get(*args)

    monkeypatch.setattr(context.responses, "get", counted)
    same = [follow(app, "lhcb", "b=2&a=1") for _ in range(5)]
    others = [follow(app, "lhcb", "a=2"), follow(app, "gridpp", "a=1&b=2")]
    streams = [asyncio.ensure_future(each) for each in (*same, follow(app, "lhcb", "a=1&b=2"), *others)]

    async def all_wait() -> bool:
        return requested == len(streams)

    await until(all_wait)
    load.go_on.set()
    for text in await asyncio.gather(*streams):
        assert "event: fragment\ndata: 42" in text
    # One for six that ask for the same, one for another query, one for another VO.
    assert load.asked == 3


async def test_followers_see_the_newly_loaded_page_next(context: AppContext, tmp_path: Path) -> None:
    load = Slow({"number": 1}, {"number": 2})
    load.go_on.set()
    app = dashboard(context, load, tmp_path)
    assert "data: 1" in await follow(app, "lhcb")
    assert "2" in await follow(app, "lhcb", path="/counted")
    assert "data: 2" in await follow(app, "lhcb")


async def test_a_dashboard_that_failed_to_open_is_opened_once_by_the_next_requests(
    context: AppContext,
) -> None:
    opened, closed, found = [], [], Slow(ConnectionError("down"), context)

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        opened.append(1)
        try:
            yield
        finally:
            closed.append(1)

    app = DashboardApp(found, VoGate(), extensions=[Extension(lifespan=lifespan)])
    waiting = await begun(*(app.open() for _ in range(3)))
    found.go_on.set()
    reported = await asyncio.gather(*waiting, return_exceptions=True)
    assert [str(each) for each in reported] == ["down", "None", "None"]
    assert (len(opened), len(closed), found.asked) == (2, 1, 2)
    await app.aclose()
    assert len(closed) == 2


@pytest.fixture
def no_installation() -> Iterator[None]:
    from diracx.tasks.web.api import environment

    environment.contexts.clear()
    yield
    environment.contexts.clear()


async def test_waiting_requests_retry_a_failed_opening_once(
    context: AppContext, no_installation: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diracx.tasks.web.api import environment

    opening = Slow(ConnectionError("down"), context)
    monkeypatch.setattr(environment, "open_context", opening)

    async def twice() -> AppContext:
        try:
            return await environment.context_from_environment()
        except ConnectionError:
            return await environment.context_from_environment()

    waiting = await begun(*(twice() for _ in range(3)))
    opening.go_on.set()
    assert await asyncio.gather(*waiting) == [context] * 3
    assert opening.asked == 2


async def test_the_database_of_the_environment_stays_open(
    no_installation: None, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diracx.tasks.plumbing.persistence import TaskDB
    from diracx.tasks.web.api import environment

    url = f"sqlite+aiosqlite:///{tmp_path}/task.db"
    async with with_tables(TaskDB(url)):
        pass
    monkeypatch.setenv("DIRACX_TASKS_REDIS_URL", redis_url)
    monkeypatch.setenv("DIRACX_DB_URL_TASKDB", url)
    found = await environment.context_from_environment()
    gc.collect()
    for _ in range(20):
        await asyncio.sleep(0)
    assert found.task_db is not None
    async with found.task_db as db:
        assert await db.search() == []
