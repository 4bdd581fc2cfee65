"""A reset connection makes the database unavailable for one call, under both event loops."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from diracx.db.sql.utils import SQLDBUnavailableError
from sqlalchemy import text
from sqlalchemy.engine import make_url
from support.resetting_proxy import ResettingProxy

from gubbins.db.sql import MyPilotDB


@pytest.mark.event_loops("asyncio", "uvloop")
@pytest.mark.parametrize("server", ["mariadb", "postgresql"])
async def test_a_reset_connection_makes_the_database_unavailable_until_the_next_transaction(
    server: str, empty_database: Callable[[str], Awaitable[str]]
) -> None:
    url = make_url(await empty_database(server))
    proxy = ResettingProxy(url.port or 0)
    async with proxy.on_port() as port:
        db = MyPilotDB(url.set(port=port).render_as_string(hide_password=False))

        async def use(pauses: int | None = None) -> None:
            async with db:
                await db.conn.execute(text("SELECT 1"))
                if pauses is not None:
                    proxy.reset()
                    for _ in range(pauses):
                        await asyncio.sleep(0)
                    await db.conn.execute(text("SELECT 1"))

        async with db.engine_context():
            for pauses in range(12):  # a reset is noticed in steps: a write may come between any two of them
                with pytest.raises(SQLDBUnavailableError):
                    await use(pauses)
                await use()
