"""Costs of a check of a VO's pilots, on SQLite."""

from __future__ import annotations

import asyncio
import tempfile
import time
import uuid
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context

from sqlalchemy import event, insert

from gubbins.db.sql import MyPilotDB
from gubbins.db.sql.schema import PilotHistory, Pilots
from gubbins.domain.pilot_states import MyPilotStatus
from gubbins.logic import my_pilots as logic

VO = "lhcb"
CES = 20


@dataclass(frozen=True)
class Check:
    """One call of `transition_pilot_states`."""

    seconds: float
    statements: int


async def check(pilots: int, moving: float = 1.0) -> Check:
    """A check of pilots of which half wait and half run.

    Args:
        moving: the share of them that moves, to RUNNING or to its end.
    """
    with tempfile.TemporaryDirectory() as directory:
        db = MyPilotDB(f"sqlite+aiosqlite:///{directory}/pilots.sqlite")
        async with db.engine_context():
            await db.create_tables()
            await _fill(db, pilots, moving)
            statements = 0

            def count(*_: object) -> None:
                nonlocal statements
                statements += 1

            event.listen(db.engine.sync_engine, "before_cursor_execute", count)
            begin = time.perf_counter()
            moved = await logic.transition_pilot_states(db, VO)
            seconds = time.perf_counter() - begin
            assert sum(moved.values()) == round(pilots * moving), moved
            return Check(seconds, statements)


def check_alone(pilots: int, moving: float = 1.0) -> Check:
    """The same in a process of its own, like a worker's: what other measurements have left in memory costs the
    garbage collector time.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_run_check, pilots, moving).result()


def _run_check(pilots: int, moving: float) -> Check:
    return asyncio.run(check(pilots, moving))


async def _fill(db: MyPilotDB, pilots: int, moving: float) -> None:
    now = datetime.now(UTC)
    long_ago = now - timedelta(hours=1)
    half_an_hour = {"queue_seconds": 1800, "run_seconds": 1800}
    async with db:
        for number in range(CES):
            await db.add_ce(f"ce{number:02}", pilots, 0.8, settings=half_an_hour)
        rows = []
        for number in range(pilots):
            runs = number % 2 == 1
            since = long_ago if number < round(pilots * moving) else now
            stamp = uuid.uuid4().hex
            rows.append(
                {
                    "id": number + 1,
                    "vo": VO,
                    "ce_name": f"ce{number % CES:02}",
                    "status": MyPilotStatus.RUNNING if runs else MyPilotStatus.SUBMITTED,
                    "stamp": stamp,
                    "reference": f"sim://{stamp}",
                    "submitted_at": since,
                    "started_at": since if runs else None,
                    "last_update": now,
                }
            )
        await db.conn.execute(insert(Pilots), rows)
        steps = [{"pilot_id": row["id"], "status": MyPilotStatus.SUBMITTED, "at": now} for row in rows]
        steps += [
            {"pilot_id": row["id"], "status": MyPilotStatus.RUNNING, "at": now}
            for row in rows
            if row["status"] is MyPilotStatus.RUNNING
        ]
        await db.conn.execute(insert(PilotHistory), steps)
