"""Requests of pilots, and the demand of VOs."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

from diracx.tasks.plumbing.sql.session import transaction
from sqlalchemy import delete, func, insert, select, update

from gubbins.domain import clock
from gubbins.domain.pilot_states import ACTIVE, MyPilotStatus

from .schema import PilotDemand, PilotRequests, Pilots, columns_of, if_given
from .session import PilotSession

#: PostgreSQL's driver has at most 32,767 bound parameters in a statement.
_BOUND_ROWS = 10_000


class Demand(NamedTuple):
    """Demand of a VO at a compute element in its last round."""

    wanted: int  # further pilots
    requested_at: datetime
    granted_at: datetime | None  # time of the last granted slot
    surplus_since: datetime | None = None  # since when more pilots wait than there are jobs for


class DemandMixin(PilotSession):
    """Statements about requests and demand."""

    @transaction
    async def add_requests(self, vo: str, counts: Mapping[str, int]) -> dict[str, list[str]]:
        """Add requests, each for a `MyPilotTask` to be spawned, and return their stamps by compute element."""
        stamps = {name: [uuid.uuid4().hex for _ in range(count)] for name, count in counts.items() if count > 0}
        row = {"vo": vo, "requested_at": clock.now()}
        rows = [{**row, "ce_name": name, "stamp": stamp} for name, own in stamps.items() for stamp in own]
        if rows:
            await self.conn.execute(insert(PilotRequests), rows)
        return stamps

    @transaction
    async def delete_requests(self, ce_name: str, stamps: Sequence[str]) -> int:
        """Delete requests; return the number deleted."""
        await self.lock_ces([ce_name])  # to prevent deadlocks on MariaDB
        deleted = 0
        for first in range(0, len(stamps), _BOUND_ROWS):
            these = PilotRequests.stamp.in_(stamps[first : first + _BOUND_ROWS])
            deleted += (await self.conn.execute(delete(PilotRequests).where(these))).rowcount
        return deleted

    @transaction
    async def refuse_requests(self, ce_name: str, refusals: Mapping[str, tuple[str, str]]) -> None:
        """Store refusals, as {stamp: (VO, reason)}, until the tasks of these requests read them."""
        if not refusals:
            return
        row = {"ce_name": ce_name, "requested_at": clock.now()}
        await self.conn.execute(
            insert(PilotRequests),
            [{**row, "vo": vo, "stamp": stamp, "refusal": why} for stamp, (vo, why) in refusals.items()],
        )

    @transaction
    async def waiting_requests(
        self, ce_name: str, *, vo: str | None = None, at_most: int
    ) -> list[tuple[str, str]]:
        """List stamp and VO of the oldest pending requests (of one VO, or all), and lock the compute element."""
        await self.lock_ces([ce_name])
        waiting = (
            select(PilotRequests.stamp, PilotRequests.vo)
            .where(PilotRequests.ce_name == ce_name, PilotRequests.refusal.is_(None))
            .where(*if_given(PilotRequests.vo, vo))
            .order_by(PilotRequests.id)
            .limit(at_most)
        )
        return [(row[0], row[1]) for row in await self.conn.execute(waiting)]

    @transaction
    async def pending_requests(self, *, since: datetime) -> dict[tuple[str, str], int]:
        """Count requests newer than `since`, as {(compute element, VO): number}, and delete older ones.

        Locks all compute elements, so that rounds of different VOs see each other's requests.
        """
        await self.lock_ces()
        await self.conn.execute(delete(PilotRequests).where(PilotRequests.requested_at < since))
        return await self.count_requests(since=since)

    @transaction
    async def count_requests(self, *, since: datetime, ce_name: str | None = None) -> dict[tuple[str, str], int]:
        """Count pending requests newer than `since` (at one compute element, or all), as `pending_requests`."""
        rows = await self.conn.execute(
            select(PilotRequests.ce_name, PilotRequests.vo, func.count())
            .where(PilotRequests.refusal.is_(None), PilotRequests.requested_at >= since)
            .where(*if_given(PilotRequests.ce_name, ce_name))
            .group_by(PilotRequests.ce_name, PilotRequests.vo)
        )
        return {(name, vo): count for name, vo, count in rows}

    @transaction
    async def count_slots(self, ce_name: str | None = None) -> dict[tuple[str, str], dict[MyPilotStatus, int]]:
        """Count active pilots (at one compute element, or all), without zeros.

        Returns:
            {(compute element, VO): {SUBMITTED or RUNNING: number}}
        """
        statement = (
            select(Pilots.ce_name, Pilots.vo, Pilots.status, func.count())
            .where(Pilots.status.in_(ACTIVE), *if_given(Pilots.ce_name, ce_name))
            .group_by(Pilots.ce_name, Pilots.vo, Pilots.status)
        )
        slots: dict[tuple[str, str], dict[MyPilotStatus, int]] = {}
        for name, vo, status, count in await self.conn.execute(statement):
            slots.setdefault((name, vo), {})[status] = count
        return slots

    @transaction
    async def get_demand(self, ce_name: str | None = None) -> dict[tuple[str, str], Demand]:
        """Read the demand of all VOs in their last round (at one compute element, or all), as `count_slots`."""
        columns = columns_of(PilotDemand, "ce_name", "vo", *Demand._fields)
        rows = await self.conn.execute(select(*columns).where(*if_given(PilotDemand.ce_name, ce_name)))
        return {(row[0], row[1]): Demand(*row[2:]) for row in rows}

    @transaction
    async def replace_demand(self, vo: str, demand: Mapping[str, Demand]) -> None:
        """Replace the demand of the VO at these compute elements."""
        if not demand:
            return
        await self.conn.execute(delete(PilotDemand).where(PilotDemand.vo == vo, PilotDemand.ce_name.in_(demand)))
        await self.conn.execute(
            insert(PilotDemand),
            [{"ce_name": name, "vo": vo, **wanted._asdict()} for name, wanted in demand.items()],
        )

    @transaction
    async def set_surplus_since(self, ce_name: str, vo: str, since: datetime | None) -> None:
        """Set since when more pilots of the VO wait there than there are jobs for; None: no surplus."""
        where = (PilotDemand.ce_name == ce_name, PilotDemand.vo == vo)
        known = await self.conn.execute(update(PilotDemand).where(*where).values(surplus_since=since))
        if not known.rowcount:
            await self.replace_demand(vo, {ce_name: Demand(0, clock.now(), None, since)})

    @transaction
    async def count_cancelling(self, vo: str) -> dict[str, int]:
        """Count the VO's waiting pilots that are to be cancelled, by compute element, without zeros."""
        cancelling = (
            select(Pilots.ce_name, func.count())
            .where(
                Pilots.vo == vo, Pilots.status == MyPilotStatus.SUBMITTED, Pilots.cancel_requested_at.is_not(None)
            )
            .group_by(Pilots.ce_name)
        )
        return {row[0]: int(row[1]) for row in await self.conn.execute(cancelling)}

    @transaction
    async def cancel_oldest_waiting(
        self, ce_name: str, vo: str, *, submitted_before: datetime, count: int, reason: str
    ) -> list[int]:
        """Request the cancellation of the VO's `count` (at most 10,000) longest waiting pilots; return ids."""
        oldest = (
            select(Pilots.id)
            .where(
                Pilots.ce_name == ce_name,
                Pilots.vo == vo,
                Pilots.status == MyPilotStatus.SUBMITTED,
                Pilots.cancel_requested_at.is_(None),
                Pilots.submitted_at < submitted_before,
            )
            .order_by(Pilots.submitted_at, Pilots.id)
            .limit(min(count, _BOUND_ROWS))
        )
        ids = [int(id) for id in (await self.conn.execute(oldest)).scalars()]
        statement = update(Pilots).where(Pilots.id.in_(ids), Pilots.status == MyPilotStatus.SUBMITTED)
        await self.conn.execute(statement.values(cancel_requested_at=clock.now(), last_error=reason))
        return ids
