"""What following pilots costs: one check of a VO's pilots, on SQLite."""

from __future__ import annotations

import tempfile
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import event, insert

from gubbins.db.sql import MyPilotDB
from gubbins.db.sql.schema import PilotHistory, Pilots
from gubbins.logic import my_pilots as logic
from gubbins.pilot_states import MyPilotStatus

VO = "lhcb"
CES = 20


@dataclass(frozen=True)
class Check:
    """One call of `transition_pilot_states`."""

    seconds: float
    statements: int


async def check(pilots: int) -> Check:
    """A check in which every pilot moves: half of them to RUNNING, half to their end."""
    with tempfile.TemporaryDirectory() as directory:
        db = MyPilotDB(f"sqlite+aiosqlite:///{directory}/pilots.sqlite")
        async with db.engine_context():
            await db.create_tables()
            await _fill(db, pilots)
            statements = 0

            def count(*_: object) -> None:
                nonlocal statements
                statements += 1

            event.listen(db.engine.sync_engine, "before_cursor_execute", count)
            begin = time.perf_counter()
            moved = await logic.transition_pilot_states(db, VO)
            seconds = time.perf_counter() - begin
            assert sum(moved.values()) == pilots, moved
            return Check(seconds, statements)


async def _fill(db: MyPilotDB, pilots: int) -> None:
    now = datetime.now(UTC)
    async with db.unit():
        for number in range(CES):
            await db.add_ce(f"ce{number:02}", pilots, 0.8)
        rows = []
        for number in range(pilots):
            runs = number % 2 == 1
            stamp = uuid.uuid4().hex
            rows.append(
                {
                    "id": number + 1,
                    "vo": VO,
                    "ce_name": f"ce{number % CES:02}",
                    "status": MyPilotStatus.RUNNING if runs else MyPilotStatus.SUBMITTED,
                    "stamp": stamp,
                    "reference": f"sim://{stamp}",
                    "submitted_at": now,
                    "started_at": now if runs else None,
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
