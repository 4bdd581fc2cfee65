"""Demand of VOs: pilots that are on their way, and how many more each would take."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import NamedTuple

from diracx.tasks.plumbing.sql.session import transaction
from sqlalchemy import delete, func, insert, select

from gubbins.domain import clock
from gubbins.domain.pilot_states import ACTIVE, MyPilotStatus

from .schema import PilotDemand, PilotRequests, Pilots, columns_of
from .session import PilotSession


class Demand(NamedTuple):
    """Number of further pilots that a VO wanted at a compute element in its last round."""

    wanted: int
    asked_at: datetime
    granted_at: datetime | None  # when it last got a slot


class DemandMixin(PilotSession):
    """Statements about requests and demand."""

    @transaction
    async def add_requests(self, ce_name: str, *, vo: str, count: int) -> None:
        """Add `count` requests: as many `MyPilotTask`s of the VO are on their way to the compute element."""
        now = clock.now()
        if count > 0:
            row = {"ce_name": ce_name, "vo": vo, "requested_at": now}
            await self.conn.execute(insert(PilotRequests), [row] * count)

    @transaction
    async def take_requests(self, ce_name: str, *, vo: str, count: int = 1) -> int:
        """Delete the oldest requests, for their tasks have started; return the number deleted."""
        oldest = (
            select(PilotRequests.id)
            .where(PilotRequests.ce_name == ce_name, PilotRequests.vo == vo)
            .order_by(PilotRequests.id)
            .limit(count)
        )
        # Two that start at once would choose the same request, or on MariaDB deadlock over it.
        await self.lock_ces([ce_name])
        ids = (await self.conn.execute(oldest)).scalars().all()
        if ids:
            await self.conn.execute(delete(PilotRequests).where(PilotRequests.id.in_(ids)))
        return len(ids)

    @transaction
    async def pending_requests(self, *, since: datetime) -> dict[tuple[str, str], int]:
        """Requests newer than `since`, as {(compute element, VO): number}; older ones are deleted.

        Until the transaction ends, no other transaction gets past this line: all requests are counted before
        any are added.
        """
        await self.lock_ces()
        await self.conn.execute(delete(PilotRequests).where(PilotRequests.requested_at < since))
        rows = await self.conn.execute(
            select(PilotRequests.ce_name, PilotRequests.vo, func.count()).group_by(
                PilotRequests.ce_name, PilotRequests.vo
            )
        )
        return {(ce_name, vo): count for ce_name, vo, count in rows}

    @transaction
    async def count_slots(self) -> dict[tuple[str, str], dict[MyPilotStatus, int]]:
        """Count held slots, as {(compute element, VO): {SUBMITTED or RUNNING: number}}; absent means none."""
        statement = (
            select(Pilots.ce_name, Pilots.vo, Pilots.status, func.count())
            .where(Pilots.status.in_(ACTIVE))
            .group_by(Pilots.ce_name, Pilots.vo, Pilots.status)
        )
        slots: dict[tuple[str, str], dict[MyPilotStatus, int]] = {}
        for ce_name, vo, status, count in await self.conn.execute(statement):
            slots.setdefault((ce_name, vo), {})[status] = count
        return slots

    @transaction
    async def get_demand(self) -> dict[tuple[str, str], Demand]:
        """Demand of each VO in its last round, by (compute element, VO)."""
        rows = await self.conn.execute(
            select(PilotDemand.ce_name, PilotDemand.vo, *columns_of(PilotDemand, *Demand._fields))
        )
        return {(row[0], row[1]): Demand(*row[2:]) for row in rows}

    @transaction
    async def put_demand(self, vo: str, demand: Mapping[str, Demand]) -> None:
        """Replace the demand of the VO at these compute elements."""
        if not demand:
            return
        await self.conn.execute(delete(PilotDemand).where(PilotDemand.vo == vo, PilotDemand.ce_name.in_(demand)))
        await self.conn.execute(
            insert(PilotDemand),
            [{"ce_name": name, "vo": vo, **wanted._asdict()} for name, wanted in demand.items()],
        )
