"""Pilots: the capacity gate, and everything that is asked about them."""

from __future__ import annotations

__all__ = ["PilotStore"]

import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Row, delete, func, insert, literal, select, update

from gubbins import clock
from gubbins.exceptions import (
    CEDisabledError,
    NoRoomError,
    PilotNotFoundError,
    UnknownCEError,
    VONotServedError,
)
from gubbins.pilot_states import ACTIVE, MyPilotStatus

from .compute_elements import CE_COLUMNS, ComputeElementStore, serves
from .schema import MAX_REASON_CHARS, ComputeElements, PilotHistory, Pilots

# Labelled with their names in Python: a row's own names are the database's.
_COLUMNS = tuple(
    column.label("pilot_id" if column.key == "id" else column.key) for column in Pilots.__table__.columns
)

_CHECK_COLUMNS = tuple(
    column
    for column in _COLUMNS
    if column.name
    in (
        "pilot_id",
        "ce_name",
        "status",
        "stamp",
        "reference",
        "submitted_at",
        "started_at",
        "missing_since",
        "cancel_requested_at",
    )
)


_COURSE = frozenset({"vo", "ce_name", "status", "submitted_at", "started_at", "ended_at"})


def _as_dict(row: Row[Any]) -> dict[str, Any]:
    return dict(row._mapping)


class PilotStore(ComputeElementStore):
    """The table Pilots."""

    async def find_pilot(self, stamp: str) -> int | None:
        """The id of the pilot with this stamp; None: there is none."""
        async with self.unit():
            return (await self.conn.execute(select(Pilots.id).where(Pilots.stamp == stamp))).scalar_one_or_none()

    async def submit_pilot(self, ce_name: str, vo: str, *, stamp: str | None = None) -> int:
        """Reserve a slot: create a SUBMITTED pilot of the VO and return its id. This is THE capacity gate.

        The row of the compute element is locked first, so all submissions to one compute element pass here
        one after the other, from whatever process, and none of them can count too few (P60).

        Args:
            ce_name: where.
            vo: whose.
            stamp: our unique name for it, 32 hexadecimal digits; None: a new one.

        Raises:
            UnknownCEError, CEDisabledError, VONotServedError, NoRoomError: as they say; nothing was created.
        """
        stamp = stamp or uuid.uuid4().hex
        now = clock.now()
        async with self.unit():
            if not await self.lock_ces([ce_name]):
                raise UnknownCEError(ce_name)
            ce = (
                await self.conn.execute(
                    select(*CE_COLUMNS).where(ComputeElements.name == ce_name).with_for_update()
                )
            ).one()
            if not ce.enabled:
                raise CEDisabledError(ce_name)
            if not serves(ce.vos, vo):
                raise VONotServedError(ce_name, vo)
            taken = (
                select(func.count())
                .select_from(Pilots)
                .where(Pilots.ce_name == ce_name, Pilots.status.in_(ACTIVE))
                .scalar_subquery()
            )
            # Counting and inserting in one statement, although the lock is held: the count is then never
            # older than the insert, under any isolation level of a transaction the caller has opened.
            reserved = await self.conn.execute(
                insert(Pilots).from_select(
                    ["vo", "ce_name", "status", "stamp", "submitted_at", "last_update"],
                    select(
                        literal(vo),
                        ComputeElements.name,
                        literal(MyPilotStatus.SUBMITTED, Pilots.status.type),
                        literal(stamp),
                        literal(now, Pilots.submitted_at.type),
                        literal(now, Pilots.last_update.type),
                    ).where(ComputeElements.name == ce_name, taken < ComputeElements.capacity),
                    include_defaults=False,
                )
            )
            if not reserved.rowcount:
                raise NoRoomError(ce_name, ce.capacity)
            pilot_id = (await self.conn.execute(select(Pilots.id).where(Pilots.stamp == stamp))).scalar_one()
            await self.conn.execute(
                insert(PilotHistory).values(pilot_id=pilot_id, status=MyPilotStatus.SUBMITTED, at=now)
            )
            return int(pilot_id)

    async def confirm_pilots(self, references: Sequence[tuple[int, str]]) -> int:
        """Note the compute element's own names of pilots (id, reference), and return how many there are."""
        async with self.unit():
            if not references:
                return 0
            if len(references) == 1:  # a join may read, and lock, other pilots of a small table
                [(id, name)] = references
                one = update(Pilots).where(Pilots.id == id).values(reference=name, missing_since=None)
                return int((await self.conn.execute(one)).rowcount)
            these = await self._staged(references)
            confirmed = await self.conn.execute(
                update(Pilots).where(self._are(these)).values(reference=these.c.reason, missing_since=None)
            )
            return int(confirmed.rowcount)

    async def release_pilots(self, pilot_ids: Sequence[int]) -> int:
        """Undo reservations that never became pilots, and return how many were undone.

        Only SUBMITTED pilots whose submission was not confirmed: a pilot that existed is never forgotten.
        """
        async with self.unit():
            if not pilot_ids:
                return 0
            these = await self._staged([(id, None) for id in pilot_ids])
            # SQLite cannot delete what is joined; MariaDB reads all pilots to delete those of a subquery.
            joins = self.conn.dialect.name != "sqlite"
            released = await self.conn.execute(
                delete(Pilots).where(
                    self._are(these) if joins else Pilots.id.in_(select(these.c.id)),
                    Pilots.status == MyPilotStatus.SUBMITTED,
                    Pilots.reference.is_(None),
                )
            )
            return int(released.rowcount)

    async def set_pilots_missing(self, pilot_ids: Sequence[int], since: datetime | None) -> None:
        """Note since when the compute element does not know these pilots; None: it knows them again."""
        async with self.unit():
            if pilot_ids:
                these = await self._staged([(id, None) for id in pilot_ids])
                await self.conn.execute(update(Pilots).where(self._are(these)).values(missing_since=since))

    async def request_cancel(self, pilot_id: int, *, reason: str) -> None:
        """Note that an active pilot is to be ended; its state changes when the compute element says so.

        Raises:
            PilotNotFoundError: there is no such pilot, or it has ended.
        """
        now = clock.now()
        async with self.unit():
            noted = await self.conn.execute(
                update(Pilots)
                .where(Pilots.id == pilot_id, Pilots.status.in_(ACTIVE))
                .values(
                    cancel_requested_at=func.coalesce(Pilots.cancel_requested_at, now),
                    last_error=reason[:MAX_REASON_CHARS],
                )
            )
            if not noted.rowcount:
                raise PilotNotFoundError(pilot_id)

    async def get_active_pilots(self, *, vo: str) -> Sequence[Row[Any]]:
        """All pilots of the VO that hold a slot, in one statement.

        Rows of `pilot_id, ce_name, status, stamp, reference, submitted_at, started_at, missing_since,
        cancel_requested_at`: no more than a check needs, for there may be very many.
        """
        async with self.unit():
            return (
                await self.conn.execute(select(*_CHECK_COLUMNS).where(Pilots.vo == vo, Pilots.status.in_(ACTIVE)))
            ).all()

    async def get_pilots_by_status(self, status: MyPilotStatus, vo: str | None) -> list[dict[str, Any]]:
        """All pilots in a state, oldest first; `vo=None`: of every VO."""
        where: list[ColumnElement[bool]] = [Pilots.status == MyPilotStatus(status)]
        if vo is not None:
            where.append(Pilots.vo == vo)
        async with self.unit():
            rows = (await self.conn.execute(select(*_COLUMNS).where(*where).order_by(Pilots.id))).all()
        return [_as_dict(row) for row in rows]

    async def search_pilots(
        self,
        *,
        vo: str | None,
        ce_name: str | None = None,
        status: MyPilotStatus | None = None,
        page: int = 1,
        per_page: int = 100,
    ) -> tuple[int, list[dict[str, Any]]]:
        """One page of pilots, newest first, with the number of all that match.

        Args:
            vo: only this VO's; None: every VO's.
            ce_name: only at this compute element.
            status: only in this state.
            page: from 1.
            per_page: pilots on a page.
        """
        where: list[ColumnElement[bool]] = []
        if vo is not None:
            where.append(Pilots.vo == vo)
        if ce_name is not None:
            where.append(Pilots.ce_name == ce_name)
        if status is not None:
            where.append(Pilots.status == status)
        async with self.unit():
            total = (await self.conn.execute(select(func.count()).select_from(Pilots).where(*where))).scalar_one()
            rows = await self.conn.execute(
                select(*_COLUMNS)
                .where(*where)
                .order_by(Pilots.id.desc())
                .limit(per_page)
                .offset((page - 1) * per_page)
            )
            return int(total), [_as_dict(row) for row in rows]

    async def newest_pilots(self, limit: int, *, vo: str | None) -> list[dict[str, Any]]:
        """The newest pilots, newest first, without what makes each of them special; `vo=None`: of every VO.

        Each has `vo`, `ce_name`, `status`, `submitted_at`, `started_at` and `ended_at`.
        """
        columns = [column for column in _COLUMNS if column.name in _COURSE]
        statement = select(*columns).order_by(Pilots.id.desc()).limit(limit)
        if vo is not None:
            statement = statement.where(Pilots.vo == vo)
        async with self.unit():
            return [_as_dict(row) for row in await self.conn.execute(statement)]

    async def get_pilot(self, pilot_id: int) -> dict[str, Any]:
        """One pilot with its `history`, oldest step first.

        Raises:
            PilotNotFoundError: there is no such pilot.
        """
        async with self.unit():
            row = (await self.conn.execute(select(*_COLUMNS).where(Pilots.id == pilot_id))).one_or_none()
            if row is None:
                raise PilotNotFoundError(pilot_id)
            steps = (
                await self.conn.execute(
                    select(PilotHistory.status, PilotHistory.at, PilotHistory.reason).where(
                        PilotHistory.pilot_id == pilot_id
                    )
                )
            ).all()
        # States are declared in the order of a life, which also tells apart steps of one instant.
        order = list(MyPilotStatus)
        steps = sorted(steps, key=lambda step: order.index(step[0]))
        history = [{"status": status, "at": at, "reason": reason} for status, at, reason in steps]
        return {**_as_dict(row), "history": history}

    async def get_pilot_summary(self, vo: str | None = None) -> dict[str, dict[str, dict[str, int]]]:
        """How many pilots there are, as {VO: {compute element: {state: number}}}; absent means none."""
        statement = (
            select(Pilots.vo, Pilots.ce_name, Pilots.status, func.count())
            .group_by(Pilots.vo, Pilots.ce_name, Pilots.status)
            .order_by(Pilots.vo, Pilots.ce_name)
        )
        if vo is not None:
            statement = statement.where(Pilots.vo == vo)
        summary: dict[str, dict[str, dict[str, int]]] = {}
        async with self.unit():
            for vo_name, ce_name, status, count in await self.conn.execute(statement):
                summary.setdefault(vo_name, {}).setdefault(ce_name, {})[str(status)] = count
        return summary
