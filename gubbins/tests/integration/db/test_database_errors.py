"""An unusable database of pilots is reported in one line with the remedy."""

from __future__ import annotations

import html
import re
from functools import partial

import httpx
import pytest
from diracx.tasks.plumbing.broker import RedisStreamBroker
from diracx.tasks.plumbing.config.reader import ConfigReader
from diracx.tasks.plumbing.registry import TaskRegistry
from diracx.tasks.plumbing.sql.errors import DatabaseError
from diracx.tasks.web.auth.backends import Principal, Role, TokenBackend
from diracx.tasks.web.context import AppContext
from diracx.tasks.web.dashboard import DashboardApp
from support.broken_databases import PASSWORD, Troubled

from gubbins.dashboard import extension
from gubbins.db.sql import MyPilotDB
from gubbins.logic import my_pilots as logic


async def test_an_error_of_the_dead_letter_database_is_reported_in_one_line(troubled_database: Troubled) -> None:
    troubled = await troubled_database(MyPilotDB.migrations)
    db = MyPilotDB(troubled.url)
    async with db.engine_context():
        for ask in (partial(logic.get_pilot, pilot_id=1), logic.list_ces):
            with pytest.raises(DatabaseError) as caught:
                await ask(db)
            for line in (str(caught.value), caught.value.detail):
                assert len(line.splitlines()) == 1
                assert PASSWORD not in line
                for words in troubled.says:
                    assert words in line


async def test_the_dashboard_responds_with_503(
    troubled_database: Troubled, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    troubled = await troubled_database(MyPilotDB.migrations)
    monkeypatch.setenv("DIRACX_DB_URL_MYPILOTDB", troubled.url)
    broker = RedisStreamBroker(redis_url)

    async def context() -> AppContext:
        return AppContext(broker, TaskRegistry.of({}), ConfigReader())

    backend = TokenBackend({"the-token-of-wilma": Principal("wilma", Role.WRITE, None)}, "")
    app = DashboardApp(context, backend, extensions=[extension()])
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        await client.post("/sign-in", data={"credential": "the-token-of-wilma"})
        for page in ("/pilots", "/pilots?vo=lhcb", "/pilots/list", "/pilots/1", "/pilots/1/output"):
            response = await client.get(page)
            assert response.status_code == 503, (page, response.text)
            text = html.unescape(response.text)
            assert PASSWORD not in text
            for words in troubled.says:
                assert words.casefold() in re.sub("</?code>", "`", text).casefold(), (page, text)
        assert (await client.get("/queues")).status_code == 200  # the others go on
    await app.aclose()
    await broker.shutdown()
