"""Downtimes of compute elements."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from diracx.tasks.plumbing.sql.session import transaction
from sqlalchemy import delete, insert, select, update

from gubbins.domain.downtimes import Downtime
from gubbins.domain.exceptions import DowntimeNotFoundError, UnknownCEError

from .schema import CEDowntimes, columns_of, if_given
from .session import PilotSession

_SELECT = select(*columns_of(CEDowntimes)).order_by(CEDowntimes.starts_at, CEDowntimes.id)


class DowntimesMixin(PilotSession):
    """Statements about downtimes."""

    @transaction
    async def add_downtime(
        self,
        ce_name: str,
        *,
        starts_at: datetime,
        ends_at: datetime,
        drain_from: datetime,
        reason: str,
        added_by: str,
        source: str | None = None,
    ) -> int:
        """Add a downtime and return its id.

        Raises:
            UnknownCEError: there is no such compute element.
        """
        if not await self.lock_ces([ce_name]):
            raise UnknownCEError(ce_name)
        values = {
            "ce_name": ce_name,
            "starts_at": starts_at,
            "ends_at": ends_at,
            "drain_from": drain_from,
            "reason": reason,
            "added_by": added_by,
            "source": source,
        }
        key = (await self.conn.execute(insert(CEDowntimes).values(values))).inserted_primary_key
        assert key is not None
        return int(key[0])

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
        """Delete a downtime.

        Raises:
            DowntimeNotFoundError: there is no such downtime.
        """
        deleted = await self.conn.execute(delete(CEDowntimes).where(CEDowntimes.id == downtime_id))
        if not deleted.rowcount:
            raise DowntimeNotFoundError(downtime_id)
