"""A pilot database after a long time: full compute elements, and many ended pilots."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import insert, text

from gubbins.db.sql import MyPilotDB
from gubbins.db.sql.schema import ComputeElements


@dataclass(frozen=True)
class World:
    """Sizes. Everything is simulated but the database and the code that works on it."""

    ces: int = 200
    vos: int = 10
    active: int = 100_000
    """Slots of all compute elements together; all VOs share each."""
    ended: int = 900_000
    """Pilots that ended in the past 30 days."""
    free: float = 0.03
    """Share of the slots that is free at the beginning."""
    run: timedelta = timedelta(hours=6)
    queue: timedelta = timedelta(minutes=10)

    @property
    def capacity(self) -> int:
        """Slots of one compute element."""
        return self.active // self.ces

    @property
    def vo_names(self) -> list[str]:
        return [f"vo{number}" for number in range(self.vos)]


#: Numbers from 0; pilots go to one compute element after the other, and at each to one VO after the other.
_NUMBERS = "WITH RECURSIVE numbers(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM numbers WHERE n + 1 < :rows) "
_PLACE = "'vo' || ((n + n / :ces) % :vos) AS vo, printf('ce%03d', n % :ces) AS ce"
_MOMENT = "strftime('%Y-%m-%d %H:%M:%f000', {})"
_STEP = 'INSERT INTO "PilotHistory" ("PilotID", "Status", "At", "Reason") SELECT "PilotID", {status}, {at}, NULL '
_STEP += 'FROM "Pilots" WHERE {where}'


async def fill(db: MyPilotDB, world: World, now: datetime) -> None:
    """Put the world into an empty SQLite database, with the history of every pilot."""
    settings = {"queue_seconds": world.queue.total_seconds(), "run_seconds": world.run.total_seconds()}
    ce = {
        "capacity": world.capacity,
        "success_rate": 0.9,
        "enabled": True,
        "backend": "simulated",
        "settings": settings,
        "created_at": now,
        "updated_at": now,
    }
    active = round(world.active * (1 - world.free))
    numbers = {"vos": world.vos, "ces": world.ces, "now": now.strftime("%Y-%m-%d %H:%M:%S")}
    async with db:
        await db.conn.execute(insert(ComputeElements), [{"name": f"ce{n:03}"} | ce for n in range(world.ces)])
        ended = "datetime(:now, '-30 days', (n * 2591000.0 / :rows) || ' seconds')"
        await db.conn.execute(
            text(
                'INSERT INTO "Pilots" ("VO", "CEName", "Status", "Stamp", "Reference", "SubmittedAt", '
                '"StartedAt", "EndedAt", "LastUpdate") '
                f"{_NUMBERS} SELECT vo, ce, CASE WHEN n % 10 = 0 THEN 'FAILED' ELSE 'DONE' END, "
                "printf('e%031d', n), 'sim://' || n, at, at, at, at "
                f"FROM (SELECT n, {_PLACE}, {_MOMENT.format(ended)} AS at FROM numbers)"
            ),
            {**numbers, "rows": world.ended},
        )
        # They started one after the other, and end so.
        seconds = world.run.total_seconds()
        started = "datetime(:now, (n * :seconds / :rows - :seconds) || ' seconds')"
        await db.conn.execute(
            text(
                'INSERT INTO "Pilots" ("VO", "CEName", "Status", "Stamp", "Reference", "SubmittedAt", '
                '"StartedAt", "LastUpdate") '
                f"{_NUMBERS} SELECT vo, ce, 'RUNNING', printf('a%031d', n), 'sim://' || n, at, at, at "
                f"FROM (SELECT n, {_PLACE}, {_MOMENT.format(started)} AS at FROM numbers)"
            ),
            {**numbers, "rows": active, "seconds": seconds},
        )
        ended_ones = "\"Status\" IN ('DONE', 'FAILED')"
        for status, at, where in (
            ("'SUBMITTED'", '"SubmittedAt"', "1"),
            ("'RUNNING'", '"StartedAt"', "1"),
            ('"Status"', '"EndedAt"', ended_ones),
        ):
            await db.conn.execute(text(_STEP.format(status=status, at=at, where=where)))
    async with db.engine.connect() as connection:
        await connection.execute(text("ANALYZE"))
        await connection.commit()
