"""Pruning of ended pilots."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from diracx.tasks.testing import TaskSystem
from sqlalchemy import func, select, update

from gubbins.db.sql import MyPilotDB, MyPilotStatus
from gubbins.db.sql.schema import PilotHistory, Pilots
from gubbins.logic import my_pilots as logic
from gubbins.tasks.my_pilots import MyPrunePilotsTask

NOW = datetime.now(UTC)


@pytest.fixture
async def aged(db: MyPilotDB) -> MyPilotDB:
    """Pilots 1-8 ended 80, 70, … 10 days ago, of two VOs; 9 runs and 10 waits, both since a year ago."""
    await db.add_ce("ce", 10, 1.0)
    for number in range(10):
        await db.submit_pilot("ce", ("lhcb", "dteam")[number % 2])
    for vo in ("lhcb", "dteam"):
        await db.advance_pilots({MyPilotStatus.RUNNING: [(id, None) for id in range(1, 10)]}, vo=vo)
        await db.advance_pilots({MyPilotStatus.DONE: [(id, None) for id in range(1, 5)]}, vo=vo)
        await db.advance_pilots({MyPilotStatus.FAILED: [(id, None) for id in range(5, 9)]}, vo=vo)
    async with db:
        await db.conn.execute(update(Pilots).values(submitted_at=NOW - timedelta(days=365)))
        for id in range(1, 9):
            ended = NOW - timedelta(days=90 - 10 * id)
            await db.conn.execute(update(Pilots).where(Pilots.id == id).values(ended_at=ended))
    return db


async def left(db: MyPilotDB) -> list[int]:
    async with db:
        return list((await db.conn.execute(select(Pilots.id).order_by(Pilots.id))).scalars())


async def test_only_pilots_that_ended_long_ago_are_deleted_with_their_history(aged: MyPilotDB) -> None:
    assert await MyPrunePilotsTask(keep_days=35).execute(my_pilot_db=aged) == 5
    assert await left(aged) == [6, 7, 8, 9, 10]
    async with aged:
        steps = select(PilotHistory.pilot_id, func.count()).group_by(PilotHistory.pilot_id)
        assert dict((await aged.conn.execute(steps)).all()) == {6: 3, 7: 3, 8: 3, 9: 2, 10: 1}
    assert await aged.count_illegal_histories() == 0
    assert await MyPrunePilotsTask(keep_days=35).execute(my_pilot_db=aged) == 0


async def test_the_oldest_pilots_are_deleted_first_in_batches_up_to_the_limit(
    aged: MyPilotDB, count_statements: Any
) -> None:
    with count_statements(aged) as statements:
        gone = await logic.prune_pilots(aged, keep=timedelta(days=5), batch=2, at_most=5)
    assert gone == 5
    assert await left(aged) == [6, 7, 8, 9, 10]
    deletes = [each for each in statements if each.startswith("DELETE")]
    assert len(deletes) == 3
    assert await MyPrunePilotsTask(keep_days=5, batch=2).execute(my_pilot_db=aged) == 3
    assert await left(aged) == [9, 10]


@pytest.mark.parametrize(
    "wrong", [{"keep_days": 0}, {"keep_days": float("nan")}, {"batch": 0}, {"batch": 10_001}, {"at_most": 0}]
)
def test_an_invalid_retention_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MyPrunePilotsTask(**wrong)


async def test_the_prune_task_runs_in_a_worker(aged: MyPilotDB) -> None:
    overrides: dict[Any, Any] = {MyPilotDB.no_transaction: lambda: aged}
    async with TaskSystem([MyPrunePilotsTask], overrides=overrides, task_db_url=None) as system:
        result = await system.result(await MyPrunePilotsTask(keep_days=35).schedule(), timeout=30)
        assert (result.is_err, result.return_value) == (False, 5)
