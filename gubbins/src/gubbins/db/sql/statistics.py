"""Pilot statistics, aggregated by the database server."""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timedelta
from typing import Any

from diracx.tasks.plumbing.sql.session import transaction
from diracx.tasks.plumbing.sql.types import UTCDateTime
from sqlalchemy import ColumnElement, Integer, Label, Select, and_, case, cast, func, literal, select, text

from gubbins.domain.pilot_states import CANCELLED_OVERDUE, MyPilotStatus, PilotOutcome

from .schema import PilotIdentities, Pilots
from .session import PilotSession

QUARTER = timedelta(minutes=15)

# Expressions instead of columns, so that SQLite does not prefer the indexes of the groups, which read all pilots.
_CE = Pilots.ce_name.concat("").label("ce")
_VO: ColumnElement[str] = Pilots.vo.concat("")
_IS_CANCELLED = and_(
    Pilots.status == MyPilotStatus.FAILED,
    Pilots.cancel_requested_at.is_not(None),
    ~func.coalesce(Pilots.last_error, "").startswith(CANCELLED_OVERDUE),
).label("cancelled")
_COUNTED: tuple[Any, ...] = (Pilots.status, func.count())


class StatisticsMixin(PilotSession):
    """Counts of events since a given time, which read only the pilots of that period."""

    @transaction
    async def count_ended_pilots(self, since: datetime, vo: str | None = None) -> dict[str, dict[str, int]]:
        """Count pilots (of one VO, or all) that ended since then, as {compute element: {state: number}}.

        Pilots that a user cancelled, or the surplus of demand, are CANCELLED: no failures of the compute element.
        """
        where = [Pilots.ended_at >= since, *_vo_filter(vo)]
        counted: Select[Any] = select(_CE, _IS_CANCELLED, *_COUNTED).where(*where)
        counted = counted.group_by(text("ce"), text("cancelled"), Pilots.status)
        ended: dict[str, dict[str, int]] = {}
        for ce_name, is_cancelled, status, count in await self.conn.execute(_by_end(counted)):
            ended.setdefault(ce_name, {})["CANCELLED" if is_cancelled else str(status)] = count
        return ended

    @transaction
    async def count_without_work(self, since: datetime, vo: str | None = None) -> dict[str, int]:
        """Count pilots (of one VO, or all) that ended since then without work, by compute element."""
        counted: Any = (
            select(_CE, func.count())
            .join(PilotIdentities, PilotIdentities.pilot_id == Pilots.id)
            .where(Pilots.ended_at >= since, PilotIdentities.outcome == PilotOutcome.NO_WORK, *_vo_filter(vo))
            .group_by(text("ce"))
        )
        rows = await self.conn.execute(_by_end(counted))
        return {str(row[0]): int(row[1]) for row in rows}

    @transaction
    async def count_steps(
        self, since: datetime, now: datetime, vo: str | None = None
    ) -> tuple[Counter[MyPilotStatus], dict[MyPilotStatus, Counter[int]]]:
        """Count pilots (of one VO, or all) in each active state, and those that entered each state since then.

        Returns:
            {active state: number} and {state: {whole quarters of an hour before `now`: number}}.
        """
        submitted, started, ended = (
            self._quarters(column, name, since, now)
            for column, name in (
                (Pilots.submitted_at, "submitted"),
                (Pilots.started_at, "started"),
                (Pilots.ended_at, "ended"),
            )
        )
        groups: list[Any] = [text("submitted"), text("started"), text("ended"), Pilots.status]
        counted = _by_end(select(submitted, started, ended, *_COUNTED).group_by(*groups))
        active: Counter[MyPilotStatus] = Counter()
        entered: dict[MyPilotStatus, Counter[int]] = {status: Counter() for status in MyPilotStatus}
        # All pilots that changed state in the period are active, or have ended in it.
        for is_active in (False, True):
            pilots = Pilots.ended_at.is_(None) if is_active else Pilots.ended_at >= since
            for *quarters, status, count in await self.conn.execute(counted.where(pilots, *_vo_filter(vo))):
                if is_active:
                    active[status] += count
                steps = (MyPilotStatus.SUBMITTED, MyPilotStatus.RUNNING, status)
                for step, quarter in zip(steps, quarters, strict=True):
                    if quarter is not None:
                        entered[step][max(0, int(quarter))] += count
        return active, entered

    def _quarters(self, moment: Any, name: str, since: datetime, now: datetime) -> Label[Any]:
        """Age of a time in quarters of an hour; NULL: before `since`, or never."""
        present = literal(now, UTCDateTime)
        quarters: ColumnElement[Any]
        match self.engine.dialect.name:
            case "sqlite":
                days = func.julianday(present) - func.julianday(moment)
                quarters = cast(days * (timedelta(days=1) // QUARTER), Integer)
            case "postgresql":
                seconds = func.date_part("epoch", present) - func.date_part("epoch", moment)
                quarters = cast(func.floor(seconds / QUARTER.seconds), Integer)
            case _:
                seconds = func.timestampdiff(text("SECOND"), moment, present)
                quarters = func.floor(seconds / QUARTER.seconds)
        return case((moment >= since, quarters)).label(name)


def _by_end(statement: Select[Any]) -> Select[Any]:
    # MariaDB would read all pilots if more than about a tenth of them match.
    for dialect in ("mysql", "mariadb"):
        statement = statement.with_hint(Pilots, "FORCE INDEX (idx_pilots_ended)", dialect)
    return statement


def _vo_filter(vo: str | None) -> list[ColumnElement[bool]]:
    return [] if vo is None else [_VO.in_([vo])]
