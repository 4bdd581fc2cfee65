"""Migrations of the pilot database."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest
from diracx.tasks.plumbing.persistence import TaskDB
from support.schema_promises import SchemaPromises, on, rows

from gubbins.db.sql import MyPilotDB, MyPilotStatus
from gubbins.db.sql.demand import Demand
from gubbins.domain.circuit_breaker import CECall
from gubbins.domain.downtimes import Downtime
from gubbins.domain.pilot_states import PilotOutcome


class TestPilotSchema(SchemaPromises):
    migrations = MyPilotDB.migrations

    async def fill(self, url: str) -> None:
        db = MyPilotDB(url)
        async with db.engine_context():
            await db.add_ce("ce1", 10, 0.5, vos=["lhcb"], settings={"a": [1, "ü"]})
            await db.add_ce("ce2", 10, 1.0)
            pilots = [await db.submit_pilot("ce1", "lhcb") for _ in range(3)]
            await db.confirm_pilots([(pilots[0], "reference 🚀")])
            for status in (MyPilotStatus.RUNNING, MyPilotStatus.FAILED):
                await db.advance_pilots({status: [(pilots[0], "why")]}, vo="lhcb")
            await db.set_pilots_missing(pilots[1:2], datetime.now(tz=UTC))
            await db.add_requests("lhcb", {"ce2": 2})
            await db.set_ce("ce2", capacity=10, success_rate=1.0, rules={"max_waiting": 3})
            await db.ban_ce("ce2", reason="maintenance 🚧")
            await db.record_failure("ce1", CECall.SUBMIT, "ü", failures=1, pause_seconds=1, max_pause_seconds=1)
            await db.record_quota("ce1", "lhcb")
            await db.replace_demand("lhcb", {"ce1": Demand(3, datetime.now(tz=UTC), None)})
            await db.queue_outputs(pilots[:1])
            now = datetime.now(tz=UTC)
            await db.add_downtime(Downtime(0, "ce1", now, now, now, "switches 🚧", "alice", None))
            stamp = (await db.get_pilot(pilots[2]))["stamp"]
            await db.set_registry_ids({stamp: 7}, ce_names=["ce1"], submitted={stamp})
            await db.release_pilots(pilots[2:])
            await db.add_secrets({pilots[0]: "0" * 64})
            await db.record_heartbeat(
                pilots[0], starts=0, stale_after=timedelta(hours=1), reported={"outcome": PilotOutcome.NODE_UNFIT}
            )


async def test_both_databases_can_share_one_schema(db_url: str) -> None:
    """Each has a version table of its own."""
    for migrations in (MyPilotDB.migrations, TaskDB.migrations):
        await migrations.upgrade(db_url)
    await MyPilotDB.migrations.downgrade(db_url, "base")
    state = await TaskDB.migrations.current(db_url)
    assert (state.revision, state.stamped) == (state.head, True)
    assert {"DeadLetters", "TaskDBVersion", "MyPilotDBVersion"} == set(await on(db_url, rows))


async def test_tables_are_made_once_and_at_the_newest_revision(db_url: str) -> None:
    db = MyPilotDB(db_url)
    async with db.engine_context():
        assert await db.create_tables()
        assert not await db.create_tables()
        state = await db.migrations.current(db_url)
        assert (state.revision, state.stamped) == (state.head, True)


async def test_a_database_of_an_older_version_is_an_error_with_the_remedy(
    empty_database: Callable[[str], Awaitable[str]],
) -> None:
    import sqlite3

    from diracx.tasks.plumbing.sql.errors import DatabaseError

    url = await empty_database("sqlite")
    await MyPilotDB.migrations.upgrade(url)
    with closing(sqlite3.connect(url.partition("///")[2])) as connection, connection:
        connection.execute("ALTER TABLE Pilots DROP COLUMN CancelRequestedAt")
    db = MyPilotDB(url)
    async with db.engine_context():
        with pytest.raises(DatabaseError, match="gubbins db upgrade"):
            await db.get_active_pilots(vo="lhcb")
