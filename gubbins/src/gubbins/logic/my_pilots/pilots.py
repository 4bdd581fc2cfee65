"""Pilots: find, count, cancel, delete."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Any

from gubbins.db.sql import MyPilotDB
from gubbins.domain import clock
from gubbins.domain.circuit_breaker import CECall
from gubbins.domain.exceptions import PilotEndedError, PilotNotFoundError
from gubbins.domain.pilot_states import ACTIVE, MyPilotStatus
from gubbins.domain.rules import rules_of
from gubbins.domain.text import one_line

from .ce_calls import at_ce, backend_of, describe_failure
from .circuits import may_call, note_failure

logger = logging.getLogger(__name__)

PRUNE_PAUSE_SECONDS = 0.05
"""Pause between two batches, for others that wait for the database."""


async def count_pilots(db: MyPilotDB, vo: str | None = None) -> dict[str, dict[str, dict[str, int]]]:
    """Count pilots (of one VO, or of all), as {VO: {compute element: {state: number}}}."""
    return await db.count_pilots(vo)


async def get_pilot_summary(db: MyPilotDB, vo: str | None = None) -> dict[str, int]:
    """Count pilots (of one VO, or of all), as {state: number}."""
    return await db.get_pilot_summary(vo)


async def count_illegal_histories(db: MyPilotDB) -> int:
    """Count pilots with a history that the state machine does not allow: always 0."""
    return await db.count_illegal_histories()


async def search_pilots(
    db: MyPilotDB,
    *,
    vo: str | None,
    ce_name: str | None = None,
    status: MyPilotStatus | None = None,
    stamps: Collection[str] | None = None,
    stale: bool = False,
    page: int = 1,
    per_page: int = 100,
) -> tuple[int, list[dict[str, Any]]]:
    """One page of pilots, newest first, with the number of all that match; `vo=None`: of every VO.

    With `stale`, only running ones whose heartbeats have stopped.
    """
    return await db.search_pilots(
        vo=vo, ce_name=ce_name, status=status, stamps=stamps, stale=stale, page=page, per_page=per_page
    )


async def count_reports(db: MyPilotDB, vo: str | None = None) -> dict[str, dict[str, dict[str, int]]]:
    """Count `stale` pilots and outcomes (of one VO, or of all), as {VO: {compute element: {name: number}}}."""
    return await db.count_reports(vo)


async def count_without_work(db: MyPilotDB, since: datetime, vo: str | None = None) -> dict[str, int]:
    """Count pilots (of one VO, or of all) that ended since then and found no work, by compute element."""
    return await db.count_without_work(since, vo=vo)


async def count_ended_pilots(db: MyPilotDB, since: datetime, vo: str | None = None) -> dict[str, dict[str, int]]:
    """Count pilots (of one VO, or of all) that ended since then, as {compute element: {state: number}}."""
    return await db.count_ended_pilots(since, vo=vo)


async def count_steps(
    db: MyPilotDB, since: datetime, now: datetime, vo: str | None = None
) -> tuple[Counter[MyPilotStatus], dict[MyPilotStatus, Counter[int]]]:
    """Count pilots (of one VO, or of all) in each active state, and those that entered each state since then.

    The latter as {state: {whole quarters of an hour before `now`: number}}.
    """
    return await db.count_steps(since, now, vo=vo)


async def get_pilot(db: MyPilotDB, pilot_id: int, vo: str | None = None) -> dict[str, Any]:
    """One pilot with its `history`.

    Args:
        db: the database.
        pilot_id: which.
        vo: for members of this VO, who do not learn which ids other VOs have; None: for administrators.

    Raises:
        PilotNotFoundError: there is no such pilot, or it is another VO's.
    """
    pilot = await db.get_pilot(pilot_id)
    if vo not in (None, pilot["vo"]):
        raise PilotNotFoundError(pilot_id)
    return pilot


async def cancel_pilot(db: MyPilotDB, pilot_id: int, *, by: str, send_now: bool = True) -> dict[str, Any]:
    """Cancel a pilot and return it as it is then.

    The request is recorded first and sent at once; every check repeats it until the compute element
    says that the pilot has ended. The state changes only then, along the arrows of the state machine.

    Args:
        db: the database.
        pilot_id: which pilot.
        by: who asks, for the record.
        send_now: False leaves the call of the compute element to the next check.

    Raises:
        PilotNotFoundError: there is no such pilot.
        PilotEndedError: it has ended already.
    """

    async def request() -> tuple[dict[str, Any], dict[str, Any]]:
        pilot = await db.get_pilot(pilot_id)
        if pilot["status"] not in ACTIVE:
            raise PilotEndedError(pilot_id, pilot["status"])
        await db.request_cancel(pilot_id, reason=f"cancellation requested by {one_line(by)}")
        return pilot, await db.get_ce(pilot["ce_name"])

    pilot, ce = await db.run(request)
    target = at_ce(pilot)._replace(cancel_requested=True)
    # A compute element that is paused or banned gets it from the first check that may call it again.
    if send_now and await may_call(db, ce, CECall.STATUS):
        try:
            async with backend_of(ce, pilot["vo"]) as backend, asyncio.timeout(rules_of(ce).timeout_seconds):
                await backend.cancel([target])
            if backend.warning is not None:
                await db.record_ce_error(ce["name"], backend.warning)
        except Exception as error:
            reason = describe_failure(ce, error)
            await note_failure(db, ce, CECall.STATUS, reason)
            logger.warning("Pilot %d will be cancelled at %s by the next check: %s", pilot_id, ce["name"], reason)
    return await db.get_pilot(pilot_id)


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
        await asyncio.sleep(PRUNE_PAUSE_SECONDS)
    return gone
