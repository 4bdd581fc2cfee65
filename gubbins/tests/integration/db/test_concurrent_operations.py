"""Concurrent operations of several VOs without deadlocks."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from datetime import timedelta

import pytest
from sqlalchemy import insert

from gubbins.db.sql import MyPilotDB, MyPilotStatus
from gubbins.db.sql.schema import Pilots
from gubbins.domain import clock
from gubbins.domain.exceptions import PilotEndedError, PilotNotFoundError, PilotSubmissionError
from gubbins.logic import my_pilots as logic

VOS = ("lhcb", "dteam", "gridpp")


async def test_concurrent_operations_do_not_block_each_other(db: MyPilotDB) -> None:
    for number, rate in enumerate((1.0, 0.5, 0.0)):
        await db.add_ce(f"ce{number}", 6, rate)

    async def submit(name: str, vo: str, stamp: str) -> None:
        with contextlib.suppress(PilotSubmissionError):
            await logic.submit_requested_pilot(db, name, vo, stamp=stamp)

    async def cancel(vo: str) -> None:
        for pilot in await db.get_pilots_by_status(MyPilotStatus.RUNNING, vo):
            with contextlib.suppress(PilotEndedError, PilotNotFoundError):
                await logic.cancel_pilot(db, pilot["pilot_id"], by="a test")

    async def live(vo: str) -> None:
        for _ in range(6):
            requests = await logic.request_pilots(db, vo, vos=VOS)
            async with asyncio.TaskGroup() as group:
                for name, stamps in requests.items():
                    for stamp in stamps:
                        group.create_task(submit(name, vo, stamp))
                group.create_task(logic.transition_pilot_states(db, vo))
                group.create_task(logic.collect_outputs(db, vo))
                group.create_task(cancel(vo))
                group.create_task(logic.prune_pilots(db, keep=timedelta(0)))

    async def steer() -> None:
        for number in range(12):
            await logic.set_ce_enabled(db, "ce0", number % 2 == 1)
            await logic.count_pilots(db)

    async with asyncio.TaskGroup() as group:
        for vo in VOS:
            group.create_task(live(vo))
        group.create_task(steer())

    for ce in await db.list_ces(vo=None):
        assert ce["active"] <= ce["capacity"]
    assert await logic.count_illegal_histories(db) == 0


async def test_a_new_file_can_be_loaded_several_times_at_once(db: MyPilotDB, tables_url: str) -> None:
    """As by the containers of a deployment, before each starts its worker."""
    names = "".join(f"  - {{name: ce{number}, capacity: 5}}\n" for number in range(20))
    specs = logic.parse_ce_file(f"compute_elements:\n{names}")
    others = [MyPilotDB(tables_url) for _ in range(4)]
    async with contextlib.AsyncExitStack() as stack:
        for other in others:
            await stack.enter_async_context(other.engine_context())
        loaded = await asyncio.gather(*(logic.load_ces(other, specs) for other in others))
    assert Counter(change for each in loaded for change in each.values()) == {"created": 20, "unchanged": 60}


@pytest.mark.parametrize("db_server", ["postgresql"], indirect=True)
async def test_a_round_can_be_withdrawn_and_cancelled_in_any_number(db: MyPilotDB) -> None:
    """PostgreSQL has at most 32,767 parameters in a statement."""
    many = 33_000
    await db.add_ce("ce", many, 1.0)
    stamps = (await db.add_requests("lhcb", {"ce": many}))["ce"]
    assert await db.delete_requests("ce", stamps) == many
    now = clock.now()
    row = {"vo": "lhcb", "ce_name": "ce", "submitted_at": now, "last_update": now}
    async with db:
        await db.conn.execute(insert(Pilots), [{**row, "stamp": stamp} for stamp in stamps])
    left = many
    for _ in range(4):
        cancelled = await db.cancel_oldest_waiting(
            "ce", "lhcb", submitted_before=clock.now() + timedelta(1), count=left, reason="no jobs"
        )
        left -= len(cancelled)
    assert (left, await db.count_cancelling("lhcb")) == (0, {"ce": many})
