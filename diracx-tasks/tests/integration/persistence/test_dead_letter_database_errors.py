"""An unusable database of dead letters is reported in one line with the remedy."""

from __future__ import annotations

import html
from typing import Any

import httpx
import pytest
from diracx.tasks.plumbing.broker import RedisStreamBroker
from diracx.tasks.plumbing.config.reader import ConfigReader
from diracx.tasks.plumbing.persistence import TaskDB
from diracx.tasks.plumbing.registry import TaskRegistry
from diracx.tasks.plumbing.sql.errors import DatabaseError
from diracx.tasks.web.api.responses import server_errors
from diracx.tasks.web.auth.backends import Principal, Role, TokenBackend
from diracx.tasks.web.context import AppContext
from diracx.tasks.web.dashboard import DashboardApp
from fastapi import Depends, FastAPI
from support.broken_databases import PASSWORD, Troubled


async def test_an_error_of_the_dead_letter_database_is_reported_in_one_line(troubled_database: Troubled) -> None:
    troubled = await troubled_database(TaskDB.migrations)
    db = TaskDB(troubled.url)
    async with db.engine_context():
        with pytest.raises(DatabaseError) as caught:
            await db.search()
    for line in (str(caught.value), caught.value.detail):
        assert len(line.splitlines()) == 1
        assert PASSWORD not in line
        for words in troubled.says:
            assert words in line


async def test_dashboard_and_routes_return_503(troubled_database: Troubled, redis_url: str) -> None:
    troubled = await troubled_database(TaskDB.migrations)
    broker, db = RedisStreamBroker(redis_url), TaskDB(troubled.url)

    async def context() -> AppContext:
        return AppContext(broker, TaskRegistry.of({}), ConfigReader(), db)

    backend = TokenBackend({"the-token-of-wilma": Principal("wilma", Role.WRITE, None)}, "")
    app = DashboardApp(context, backend, extensions=[])
    api = FastAPI(dependencies=[Depends(server_errors)])

    @api.get("/dead-letters")
    async def dead_letters() -> Any:
        return await db.search()

    def check(response: httpx.Response) -> None:
        assert response.status_code == 503, response.text
        text = html.unescape(response.text).replace("<code>", "`").replace("</code>", "`")
        assert PASSWORD not in text
        for words in troubled.says:
            assert words.casefold() in text.casefold()

    async with (
        db.engine_context(),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as pages,
        httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://localhost") as routes,
    ):
        await pages.post("/sign-in", data={"credential": "the-token-of-wilma"})
        for page in ("/dead-letters/1",):
            check(await pages.get(page))
        check(await routes.get("/dead-letters"))
    await app.aclose()
    await broker.shutdown()
