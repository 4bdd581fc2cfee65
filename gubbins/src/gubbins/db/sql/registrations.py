"""Synchronization state of pilots with DiracX's pilot registry."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from datetime import datetime
from typing import Any, NamedTuple

from diracx.core.models.pilot import PilotStatus
from diracx.tasks.plumbing.sql.session import transaction
from sqlalchemy import ColumnElement, Select, and_, case, delete, insert, literal, null, select, update

from gubbins.domain.pilot_states import MyPilotStatus

from .schema import Pilots, UndoneRegistrations, columns_of, if_given
from .session import PilotSession

OPEN_STATUSES = (PilotStatus.SUBMITTED, PilotStatus.WAITING, PilotStatus.RUNNING)
"""Statuses in the registry that are not final."""


def _status_literal(status: PilotStatus) -> ColumnElement[PilotStatus]:
    return literal(status, Pilots.registered.type)


_registry_status = case(
    (Pilots.status == MyPilotStatus.RUNNING, _status_literal(PilotStatus.RUNNING)),
    (Pilots.status == MyPilotStatus.DONE, _status_literal(PilotStatus.DONE)),
    (
        and_(Pilots.status == MyPilotStatus.FAILED, Pilots.cancel_requested_at.is_not(None)),
        _status_literal(PilotStatus.ABORTED),
    ),
    (Pilots.status == MyPilotStatus.FAILED, _status_literal(PilotStatus.FAILED)),
    (Pilots.reference.is_(None), _status_literal(PilotStatus.SUBMITTED)),
    else_=_status_literal(PilotStatus.WAITING),
)


class Registration(NamedTuple):
    """A pilot as it is to be written to the registry."""

    pilot_id: int
    stamp: str
    vo: str
    ce_name: str
    reference: str | None
    submitted_at: datetime
    waiting_reason: str | None
    last_error: str | None
    registry_id: int | None
    status: PilotStatus


_COLUMNS = (
    Pilots.id.label("pilot_id"),
    *columns_of(Pilots, *Registration._fields[1:-1]),
    _registry_status.label("there"),
)


class RegistrationsMixin(PilotSession):
    """Statements about the synchronization with the pilot registry."""

    @transaction
    async def unwritten_registrations(self, *, vo: str, limit: int) -> list[Registration]:
        """List the VO's pilots that are to be written to the registry: changed ones first, then the newest."""
        changed = and_(Pilots.registered.in_(OPEN_STATUSES), Pilots.registered != _registry_status)
        rows = await self._registrations(select(*_COLUMNS).where(Pilots.vo == vo, changed).limit(limit))
        if len(rows) < limit:
            unwritten = select(*_COLUMNS).where(Pilots.vo == vo, Pilots.registered.is_(None))
            rows += await self._registrations(unwritten.order_by(Pilots.id.desc()).limit(limit - len(rows)))
        return rows

    @transaction
    async def registrations(self, *, vo: str | None, after: int, limit: int) -> list[Registration]:
        """List pilots (of one VO, or all) with ids above `after`, in the order of the ids."""
        later = select(*_COLUMNS).where(Pilots.id > after, *if_given(Pilots.vo, vo))
        return await self._registrations(later.order_by(Pilots.id).limit(limit))

    async def _registrations(self, statement: Select[Any]) -> list[Registration]:
        return [Registration(*row) for row in await self.conn.execute(statement)]

    @transaction
    async def set_registry_ids(
        self, ids: Mapping[str, int], *, ce_names: Collection[str], submitted: Set[str]
    ) -> None:
        """Store the ids of pilots in the registry.

        Args:
            ids: ids in the registry, by stamp.
            ce_names: compute elements of the pilots.
            submitted: stamps of unconfirmed pilots, whose submission may have been undone meanwhile.
        """
        if not ids:
            return
        await self.lock_ces(ce_names)
        these = await self._staged([(id, stamp) for stamp, id in ids.items()])
        await self.conn.execute(
            update(Pilots).where(Pilots.stamp == these.c.reason).values(registry_id=these.c.id)
        )
        pruned = (ids.keys() & submitted) - await self.known_stamps(submitted)
        if pruned:
            undone = [{"registry_id": ids[stamp], "stamp": stamp} for stamp in pruned]
            await self.conn.execute(insert(UndoneRegistrations), undone)

    @transaction
    async def known_stamps(self, stamps: Collection[str]) -> set[str]:
        """Find which of the stamps pilots have."""
        return set((await self.conn.execute(select(Pilots.stamp).where(Pilots.stamp.in_(stamps)))).scalars())

    @transaction
    async def mark_registered(self, pilots: Sequence[Registration]) -> None:
        """Mark pilots as written to the registry, except those that have changed since."""
        await self.lock_ces({pilot.ce_name for pilot in pilots})
        for status in {pilot.status for pilot in pilots}:
            of_status = [(pilot.pilot_id, pilot.waiting_reason) for pilot in pilots if pilot.status is status]
            these = await self._staged(of_status)
            same_reason = Pilots.waiting_reason.is_not_distinct_from(these.c.reason)
            unchanged = and_(_registry_status == status, same_reason, Pilots.registry_id.is_not(None))
            await self.conn.execute(
                update(Pilots)
                .where(self._is_staged(these))
                .values(registered=case((unchanged, _status_literal(status)), else_=null()))
            )

    @transaction
    async def undone_registrations(self, limit: int) -> list[tuple[int, int, str]]:
        """List registered pilots whose submission was undone: row id, id in the registry, stamp."""
        columns = (UndoneRegistrations.id, UndoneRegistrations.registry_id, UndoneRegistrations.stamp)
        rows = await self.conn.execute(select(*columns).order_by(UndoneRegistrations.id).limit(limit))
        return [(row[0], row[1], row[2]) for row in rows]

    @transaction
    async def delete_undone_registrations(self, numbers: Sequence[int]) -> None:
        """Delete these rows, after the update of the registry."""
        await self.conn.execute(delete(UndoneRegistrations).where(UndoneRegistrations.id.in_(numbers)))
