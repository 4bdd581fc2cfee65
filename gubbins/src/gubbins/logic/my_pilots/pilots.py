"""Pilots: find, count, cancel, delete."""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta
from typing import Any

from gubbins.db.sql import MyPilotDB
from gubbins.domain import clock
from gubbins.domain.circuit_breaker import CECall
from gubbins.domain.exceptions import PilotEndedError, PilotNotFoundError
from gubbins.domain.pilot_states import ACTIVE
from gubbins.domain.rules import rules_of
from gubbins.domain.text import one_line

from .ce_calls import at_ce, backend_of, describe_failure
from .circuits import is_reachable, record_call_failure

logger = logging.getLogger(__name__)

PRUNE_PAUSE_SECONDS = 0.05
"""Pause between two batches, in which other transactions run."""


count_ended_pilots = MyPilotDB.count_ended_pilots
count_illegal_histories = MyPilotDB.count_illegal_histories
count_pilots = MyPilotDB.count_pilots
count_reports = MyPilotDB.count_reports
count_steps = MyPilotDB.count_steps
count_without_work = MyPilotDB.count_without_work
get_pilot_summary = MyPilotDB.get_pilot_summary
search_pilots = MyPilotDB.search_pilots


async def get_pilot(db: MyPilotDB, pilot_id: int, vo: str | None = None) -> dict[str, Any]:
    """Get one pilot with its `history`.

    Args:
        vo: VO of the user; None: administrators.

    Raises:
        PilotNotFoundError: there is no such pilot, or it belongs to another VO.
    """
    pilot = await db.get_pilot(pilot_id)
    if vo not in (None, pilot["vo"]):
        raise PilotNotFoundError(pilot_id)
    return pilot


async def cancel_pilot(db: MyPilotDB, pilot_id: int, *, by: str, send_now: bool = True) -> dict[str, Any]:
    """Cancel a pilot and return it.

    The request is recorded, then sent to the compute element, unless its circuit is open or half-open; every check
    sends it again until the compute element reports that the pilot has ended. Only then does the state change.

    Args:
        by: user, for the record.
        send_now: False: the next check sends it.

    Raises:
        PilotNotFoundError: there is no such pilot.
        PilotEndedError: it has ended already.
    """

    async def request() -> tuple[dict[str, Any], dict[str, Any]]:
        pilot = await db.get_pilot(pilot_id)
        if pilot["status"] not in ACTIVE:
            raise PilotEndedError(pilot_id, pilot["status"])
        await db.request_cancels([(pilot_id, f"cancellation requested by {one_line(by)}")])
        return pilot, await db.get_ce(pilot["ce_name"], pilot["vo"])

    pilot, ce = await db.run(request)
    target = at_ce(pilot)._replace(cancel_requested=True)
    if send_now and is_reachable(ce):
        try:
            async with backend_of(ce, pilot["vo"]) as backend, asyncio.timeout(rules_of(ce).timeout_seconds):
                await backend.cancel([target])
            if backend.warning is not None:
                await db.record_ce_error(ce["name"], backend.warning)
        except Exception as error:
            reason = describe_failure(ce, error)
            await record_call_failure(db, ce, CECall.STATUS, reason, error)
            logger.warning("Pilot %d will be cancelled at %s by the next check: %s", pilot_id, ce["name"], reason)
    return await db.get_pilot(pilot_id)


async def prune_pilots(db: MyPilotDB, *, keep: timedelta, batch: int = 1_000, at_most: int = 100_000) -> int:
    """Delete ended pilots with their history, oldest first, and return their number.

    Each batch is a transaction of its own.

    Args:
        db: not in a transaction.
        keep: retention time after the end of a pilot.
        batch: pilots in one transaction.
        at_most: pilots in one call.
    """
    ended_before = clock.now() - keep
    total = 0
    while total < at_most:
        size = min(batch, at_most - total)
        deleted = await db.delete_ended_pilots(ended_before=ended_before, limit=size)
        total += deleted
        if deleted < size:
            break
        await asyncio.sleep(PRUNE_PAUSE_SECONDS)
    return total
