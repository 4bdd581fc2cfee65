"""Submit one pilot."""

from __future__ import annotations

__all__ = ["submit_pilot"]

import asyncio
import logging

from gubbins.ces import PilotAtCE
from gubbins.db.sql import MyPilotDB
from gubbins.exceptions import CERefusedError, CESettingsError

from .backends import CE_TIMEOUT_SECONDS, backend_of, describe_failure

logger = logging.getLogger(__name__)


async def submit_pilot(db: MyPilotDB, ce_name: str, vo: str) -> int:
    """Submit one pilot of a VO to a compute element and return its id.

    The slot is reserved first, in the database, and the compute element asked afterwards. If it refuses, the
    reservation is undone as if it had never been (the refusal is noted at the compute element). If it does
    not answer, nobody knows whether it has the pilot: the reservation stays, and the next checks find out.

    Raises:
        PilotSubmissionError: a subclass says why not: unknown or disabled compute element, VO not served, no
            room, refused.
    """
    ce = await db.get_ce(ce_name)
    try:
        async with backend_of(ce) as backend:
            async with db.unit():
                pilot_id = await db.submit_pilot(ce_name, vo=vo)
                stamp = (await db.get_pilot(pilot_id))["stamp"]
            try:
                async with asyncio.timeout(CE_TIMEOUT_SECONDS):
                    outcome = (await backend.submit([PilotAtCE(stamp=stamp, vo=vo)]))[stamp]
            except Exception as error:
                reason = describe_failure(error)
                await db.record_ce_error(ce_name, reason)
                raise CERefusedError(ce_name, f"{reason}; the next checks will find out") from error
    except CESettingsError as error:
        await db.record_ce_error(ce_name, str(error))
        raise CERefusedError(ce_name, str(error)) from error
    async with db.unit():
        if outcome.reference is None:
            reason = outcome.error or "no reason given"
            await db.release_pilots([pilot_id])
            await db.record_ce_error(ce_name, reason)
        else:
            await db.confirm_pilots([(pilot_id, outcome.reference)])
            await db.record_ce_error(ce_name, None)
    if outcome.reference is None:
        raise CERefusedError(ce_name, reason)
    logger.debug("Submitted pilot %d of %s to %s", pilot_id, vo, ce_name)
    return pilot_id
