"""Concurrent operations of several VOs without deadlocks."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import timedelta

from support.pilot_requests import request_pilots

from gubbins.db.sql import MyPilotDB, MyPilotStatus
from gubbins.domain.exceptions import PilotEndedError, PilotNotFoundError, PilotSubmissionError
from gubbins.logic import my_pilots as logic

VOS = ("lhcb", "dteam", "gridpp")


async def test_concurrent_operations_do_not_block_each_other(db: MyPilotDB) -> None:
    for number, rate in enumerate((1.0, 0.5, 0.0)):
        await db.add_ce(f"ce{number}", 6, rate)

    async def submit(name: str, vo: str) -> None:
        with contextlib.suppress(PilotSubmissionError):
            await logic.submit_requested_pilot(db, name, vo)

    async def cancel(vo: str) -> None:
        for pilot in await db.get_pilots_by_status(MyPilotStatus.RUNNING, vo):
            with contextlib.suppress(PilotEndedError, PilotNotFoundError):
                await logic.cancel_pilot(db, pilot["pilot_id"], by="a test")

    async def live(vo: str) -> None:
        for _ in range(6):
            requests = await request_pilots(db, vo, vos=VOS)
            async with asyncio.TaskGroup() as group:
                for name, count in requests.items():
                    for _ in range(count):
                        group.create_task(submit(name, vo))
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
