"""Forgetting pilots that ended long ago."""

from __future__ import annotations

__all__ = ["PruningStore"]

from collections.abc import Collection, Sequence
from datetime import datetime

from diracx.tasks.plumbing.sql.session import transaction
from sqlalchemy import delete, select

from .schema import Pilots
from .session import PilotDBConnection


class PruningStore(PilotDBConnection):
    """Pilots that nobody asks about any more."""

    async def delete_ended_pilots(self, *, ended_before: datetime, limit: int) -> int:
        """Delete pilots that ended before then, with their history, and return how many were.

        The oldest ends come first, `limit` of them at most: one short transaction. Active pilots have not ended.
        """
        # Nothing is decided by what is read, for what has ended stays so.
        oldest = select(Pilots.id, Pilots.ce_name).where(Pilots.ended_at < ended_before)
        rows = await self._rows(oldest.order_by(Pilots.ended_at).limit(limit))
        return await self._delete([row[0] for row in rows], {row[1] for row in rows}, ended_before) if rows else 0

    @transaction
    async def _delete(self, ids: Sequence[int], ce_names: Collection[str], ended_before: datetime) -> int:
        await self.lock_ces(ce_names)  # as all who write; else, on MariaDB, it deadlocks with checks
        # By their ids, for MariaDB reads all pilots to delete those of a subquery.
        gone = await self.conn.execute(delete(Pilots).where(Pilots.id.in_(ids), Pilots.ended_at < ended_before))
        return int(gone.rowcount)
