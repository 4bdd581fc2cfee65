"""Dashboard pages during outages of a server or database."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
import pytest
from diracx.tasks.operations.health import Alert, Health, Severity
from diracx.tasks.operations.visibility import Viewer
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.config.reader import ConfigReader
from diracx.tasks.plumbing.persistence import DeadLetter, TaskDB
from diracx.tasks.plumbing.registry import TaskRegistry
from diracx.tasks.web.auth.backends import Principal, Role, TokenBackend
from diracx.tasks.web.context import AppContext
from diracx.tasks.web.dashboard import DashboardApp
from redis.asyncio import Redis
from support.dashboard_world import WRITER

NO_SERVER = "127.0.0.1:1"
DATABASES = [
    f"mysql+aiomysql://tasks:sesame@{NO_SERVER}/tasks",
    f"postgresql+asyncpg://tasks:sesame@{NO_SERVER}/tasks",
    "sqlite+aiosqlite:////nowhere/at/all.db",
]
pytestmark = pytest.mark.leaves_keys("diracx:*")


@asynccontextmanager
async def dashboard(redis_url: str, task_db_url: str | None) -> AsyncIterator[httpx.AsyncClient]:
    async with AsyncExitStack() as stack:
        broker = RedisStreamBroker(redis_url)
        stack.push_async_callback(broker.shutdown)
        task_db = None if task_db_url is None else TaskDB(task_db_url)
        if task_db is not None:
            await stack.enter_async_context(task_db.engine_context())
        context = AppContext(broker, TaskRegistry(), ConfigReader(), task_db, "test")

        async def this() -> AppContext:
            return context

        backend = TokenBackend({WRITER: Principal("wilma", Role.WRITE, None)}, "")
        app = DashboardApp(this, backend, hosts={"localhost"}, extensions=[])
        stack.push_async_callback(app.aclose)
        transport = httpx.ASGITransport(app)
        client = await stack.enter_async_context(
            httpx.AsyncClient(transport=transport, base_url="http://localhost:8790")
        )
        await client.post("/sign-in", data={"credential": WRITER})
        yield client


@pytest.mark.parametrize("url", DATABASES, ids=lambda url: url.partition("+")[0])
async def test_without_the_database_of_dead_letters_the_rest_is_shown(
    redis: Redis, redis_url: str, url: str
) -> None:
    dead_letter = DeadLetter(task_id="in-redis", task_name="test:Copy", reason="exhausted", detail="", data=b"")
    await redis.xadd(keys.DEAD_LETTERS, dead_letter.to_stored())
    async with dashboard(redis_url, url) as client:
        overview = await client.get("/")
        assert overview.status_code == 200
        for text in (
            "The database of dead letters cannot be checked",
            "1 dead letter waits in Redis",
            "Queues",
        ):
            assert text in overview.text
        assert "sesame" not in overview.text
        dead_letters = await client.get("/dead-letters")
        assert dead_letters.status_code == 200
        for text in ("The database of dead letters does not respond", "in-redis"):
            assert text in dead_letters.text
        assert "127.0.0.1" not in dead_letters.text
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.text) == (200, "ok\nunknown source_away\nwarning dead_letters_waiting\n")


async def test_without_redis_the_overview_reports_it() -> None:
    async with dashboard(f"redis://{NO_SERVER}", None) as client:
        overview = await client.get("/")
        assert overview.status_code == 200
        assert "Redis does not respond" in overview.text
        assert "No alerts" not in overview.text
        assert "DIRACX_DB_URL_TASKDB is not set here" in overview.text
        running = await client.get("/running")
        assert running.status_code == 503
        assert "127.0.0.1" not in running.text
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.text) == (503, "not ready\ncritical server_away\n")


def test_a_viewer_of_one_vo_sees_that_there_is_an_error_without_details() -> None:
    def alert(check: str, subject: str, public: bool = False) -> Alert:
        return Alert(
            check=check,
            severity=Severity.CRITICAL,
            summary=f"{subject} is wrong",
            remedy=f"see {subject}",
            subject=subject,
            public=public,
        )

    health = Health(
        alerts=[
            alert("tasks_overdue", "t1"),
            alert("tasks_overdue", "t2"),
            alert("backlog", "queue", public=True),
        ],
        unchecked=["pilots"],
    )
    assert health.for_viewer(Viewer(None)) == health
    shown = health.for_viewer(Viewer("lhcb"))
    assert {(each.check, each.count) for each in shown.alerts} == {("tasks_overdue", 2), ("backlog", 1)}
    assert "t1" not in repr(shown)
    assert "Tasks continue after their time limit" in repr(shown)
