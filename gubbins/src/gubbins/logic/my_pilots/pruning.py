"""Delete pilots that ended long ago."""

from __future__ import annotations

__all__ = ["prune_pilots"]

import asyncio
from datetime import timedelta

from gubbins.db.sql import MyPilotDB
from gubbins.domain import clock

PAUSE_SECONDS = 0.05
"""Pause between two batches, for others that wait for the database."""


async def prune_pilots(db: MyPilotDB, *, keep: timedelta, batch: int = 1_000, at_most: int = 100_000) -> int:
    """Delete pilots that ended longer ago than that, with their history, and return how many were.

    The oldest come first. Each batch is a transaction of its own, so that others do not wait long; batches that
    are done stay done when it is interrupted.

    Args:
        db: the database; not in a transaction.
        keep: how long after its end a pilot is kept.
        batch: pilots in one transaction.
        at_most: pilots in one call; the next call goes on.
    """
    ended_before = clock.now() - keep
    gone = 0
    while gone < at_most:
        size = min(batch, at_most - gone)
        deleted = await db.delete_ended_pilots(ended_before=ended_before, limit=size)
        gone += deleted
        if deleted < size:
            break
        await asyncio.sleep(PAUSE_SECONDS)
    return gone
