"""Hosts with wrong clocks that share a database use its clock."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any

import pytest
from diracx.tasks.plumbing.persistence import TaskDB
from diracx.tasks.plumbing.persistence.dead_letter import DeadLetter
from diracx.tasks.plumbing.sql import clock as database_clock
from typer.testing import CliRunner

from gubbins.cli.app import app
from gubbins.db.sql import MyPilotDB
from gubbins.domain import clock

SOON = timedelta(seconds=30)


def set_clock(monkeypatch: pytest.MonkeyPatch, ahead_seconds: float) -> None:
    """Let the clock of this machine be wrong, as far as the databases' clients can see."""

    class Wrong(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            return datetime.now(tz) + timedelta(seconds=ahead_seconds)

    monkeypatch.setattr(database_clock, "datetime", Wrong)
    monkeypatch.setattr(clock.database, "ahead", timedelta(0))


def about_now(moment: datetime) -> bool:
    return abs(moment - datetime.now(UTC)) < SOON


@pytest.mark.parametrize("ahead_seconds", [-600, 600])
@pytest.mark.parametrize("server", ["mariadb", "postgresql"])
async def test_a_host_with_a_wrong_clock_writes_the_time_of_the_database(
    server: str,
    ahead_seconds: float,
    empty_database: Callable[[str], Awaitable[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pilots, dead_letters = MyPilotDB(await empty_database(server)), TaskDB(await empty_database(server))
    for database in (pilots, dead_letters):
        async with database.engine_context():
            await database.migrations.create(database.engine)
    set_clock(monkeypatch, ahead_seconds)
    assert not about_now(clock.now())
    async with pilots.engine_context(), dead_letters.engine_context():
        await pilots.add_ce("ce", capacity=1, success_rate=1.0)  # the first thing that this process does
        [ce] = await pilots.list_ces()
        assert about_now(ce["created_at"])
        assert about_now(clock.now()), "and so has everything that is compared with it"
        row = DeadLetter(
            task_id="t", task_name="a:B", reason="exhausted", detail="", data=b"", delivery_id="s/1-1"
        )
        async with dead_letters as db:
            await db.insert(row)
        async with dead_letters as db:
            [stored] = await db.search()
        assert about_now(stored["buried_at"])


@pytest.mark.parametrize("ahead_seconds", [-600, 600])
async def test_a_downtime_from_now_on_starts_at_the_time_of_the_database(
    ahead_seconds: float, empty_database: Callable[[str], Awaitable[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pilots = MyPilotDB(await empty_database("postgresql"))
    async with pilots.engine_context():
        await pilots.create_tables()
        await pilots.add_ce("ce", capacity=1, success_rate=1.0)
        set_clock(monkeypatch, ahead_seconds)
        monkeypatch.setenv("DIRACX_DB_URL_MYPILOTDB", pilots.engine.url.render_as_string(hide_password=False))
        monkeypatch.delenv("DIRACX_TASKS_REDIS_URL", raising=False)
        add = ["ce", "downtime", "add", "ce", "--hours", "5", "--reason", "switches"]
        done = await asyncio.to_thread(CliRunner().invoke, app, add)
        assert done.exit_code == 0, done.output
        [downtime] = await pilots.get_downtimes(ends_after=None)
    assert about_now(downtime.starts_at)
    assert about_now(downtime.ends_at - timedelta(hours=5))


async def test_clock_differences_below_a_second_are_ignored(
    empty_database: Callable[[str], Awaitable[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_clock(monkeypatch, 0.3)
    pilots = MyPilotDB(await empty_database("postgresql"))
    async with pilots.engine_context():
        await pilots.create_tables()
    assert clock.database.ahead == timedelta(0)
