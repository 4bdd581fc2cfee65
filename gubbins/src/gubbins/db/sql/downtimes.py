"""Downtimes of compute elements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime
from typing import Any

from diracx.tasks.plumbing.sql.session import transaction
from sqlalchemy import ColumnElement, and_, delete, insert, select, update

from gubbins.domain.downtimes import Downtime
from gubbins.domain.exceptions import DowntimeNotFoundError, UnknownCEError

from .schema import CEDowntimes, columns_of, if_given
from .session import PilotSession

_SELECT = select(*columns_of(CEDowntimes)).order_by(CEDowntimes.starts_at, CEDowntimes.id)


def is_in_downtime(ce_name: Any, now: datetime) -> ColumnElement[bool]:
    """Condition of the downtimes of a compute element, given by name or column, with no submissions now."""
    return and_(CEDowntimes.ce_name == ce_name, CEDowntimes.drain_from <= now, CEDowntimes.ends_at > now)


class DowntimesMixin(PilotSession):
    """Statements about downtimes."""

    @transaction
    async def add_downtime(self, downtime: Downtime) -> Downtime:
        """Add a downtime, whatever its id, and return it with the new one.

        Raises:
            UnknownCEError: there is no such compute element.
        """
        if not await self.lock_ces([downtime.ce_name]):
            raise UnknownCEError(downtime.ce_name)
        values = asdict(downtime)
        del values["id"]
        key = (await self.conn.execute(insert(CEDowntimes).values(values))).inserted_primary_key
        assert key is not None
        return replace(downtime, id=int(key[0]))

    @transaction
    async def get_downtimes(self, *, ends_after: datetime | None, ce_name: str | None = None) -> list[Downtime]:
        """List downtimes (of one compute element, or all) that end after `ends_after` (None: all)."""
        statement = _SELECT.where(*if_given(CEDowntimes.ce_name, ce_name))
        if ends_after is not None:
            statement = statement.where(CEDowntimes.ends_at > ends_after)
        return [Downtime(**row._mapping) for row in await self.conn.execute(statement)]

    @transaction
    async def get_downtime(self, downtime_id: int) -> Downtime:
        """Get one downtime.

        Raises:
            DowntimeNotFoundError: there is no such downtime.
        """
        row = (await self.conn.execute(_SELECT.where(CEDowntimes.id == downtime_id))).one_or_none()
        if row is None:
            raise DowntimeNotFoundError(downtime_id)
        return Downtime(**row._mapping)

    @transaction
    async def set_downtime_end(self, downtime_ids: Sequence[int], ends_at: datetime) -> None:
        """Set the end of downtimes."""
        if downtime_ids:
            statement = update(CEDowntimes).where(CEDowntimes.id.in_(downtime_ids))
            await self.conn.execute(statement.values(ends_at=ends_at))

    @transaction
    async def delete_downtime(self, downtime_id: int) -> None:
        """Delete a downtime, if there is one of this id."""
        await self.conn.execute(delete(CEDowntimes).where(CEDowntimes.id == downtime_id))
