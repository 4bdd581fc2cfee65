"""Forgetting pilots that ended long ago."""

from __future__ import annotations

__all__ = ["PruningStore"]

from datetime import datetime

from sqlalchemy import delete, select

from .connection import PilotDBConnection
from .schema import Pilots


class PruningStore(PilotDBConnection):
    """Pilots that nobody asks about any more."""

    async def delete_ended_pilots(self, *, ended_before: datetime, limit: int) -> int:
        """Delete pilots that ended before then, with their history, and return how many were.

        The oldest ends come first, `limit` of them at most: one short transaction. Active pilots have not ended.
        """
        # Not in the same transaction: on SQLite, one that begins by reading may be refused the right to write.
        # Nothing is decided by what is read, for what has ended stays so.
        async with self.unit():
            oldest = select(Pilots.id).where(Pilots.ended_at < ended_before).order_by(Pilots.ended_at).limit(limit)
            ids = list((await self.conn.execute(oldest)).scalars())
        async with self.unit():
            if not ids:
                return 0
            # By their ids, for MariaDB reads all pilots to delete those of a subquery.
            gone = await self.conn.execute(
                delete(Pilots).where(Pilots.id.in_(ids), Pilots.ended_at < ended_before)
            )
            return int(gone.rowcount)
