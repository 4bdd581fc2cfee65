"""Submit one pilot."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

from gubbins.ces import CEBackend, PilotAtCE
from gubbins.db.sql import MyPilotDB
from gubbins.db.sql.schema import MAX_REASON_CHARS
from gubbins.domain.circuit_breaker import CECall
from gubbins.domain.exceptions import (
    CEPausedError,
    CEQuotaError,
    CERefusedError,
    CESettingsError,
    VONotServedError,
)
from gubbins.domain.pilot_states import MyPilotStatus
from gubbins.domain.rules import rules_of, serves
from gubbins.domain.text import one_line

from .ce_calls import backend_of, describe_failure
from .circuits import acquire_submission, record_call_failure, record_call_success, submission_blocker
from .identity import with_identities
from .response_validation import check_outcome

logger = logging.getLogger(__name__)

_ABANDONED = "was accepted after its submission had been abandoned, and is cancelled"


async def submit_pilot(db: MyPilotDB, ce_name: str, vo: str, *, stamp: str | None = None) -> int:
    """Submit one pilot of a VO to a compute element and return its id.

    A slot is reserved in the database first, where capacity and rules are checked; then the compute element is
    called. A refusal releases the slot and is recorded at the compute element. If there is no response, the pilot
    may exist: it keeps its slot, and the next checks determine its state.

    Args:
        stamp: unique name of the pilot, 32 hexadecimal digits. An interrupted submission with this stamp is
            resumed, without a second pilot. None: a new stamp.

    Raises:
        PilotSubmissionError: a subclass for each reason: unknown, disabled or paused compute element, VO not
            served, no free slot, a rule, refused.
    """
    async with open_for_submission(db, ce_name, vo) as (ce, backend):
        stamp = stamp or uuid.uuid4().hex
        begun = await db.find_pilot(stamp)
        if begun is not None and await _is_known(db, begun):
            return begun
        pilot_id, pilot = await _reserve(db, ce, vo, stamp, begun)
        try:
            async with asyncio.timeout(rules_of(ce).timeout_seconds):
                response = await backend.submit([pilot])
            outcome = check_outcome(ce, response, stamp)
        except Exception as error:
            reason = describe_failure(ce, error)
            await record_call_failure(db, ce, CECall.SUBMIT, reason, error)
            raise CERefusedError(ce_name, f"{reason}; the next checks will find out", responded=False) from error
        if outcome.reference is not None:
            return await confirm(db, ce, backend, pilot_id, pilot._replace(reference=outcome.reference))
    reason = outcome.error or "no reason given"

    async def abandon() -> int:
        await db.lock_ces([ce_name])
        if begun is None:  # else the first attempt may have been accepted
            await db.release_pilots([pilot_id])
        if outcome.quota:
            await record_call_success(db, ce, CECall.SUBMIT)
            return await db.record_quota(ce_name)
        await record_call_failure(db, ce, CECall.SUBMIT, reason)
        return 0

    quota = await db.run(abandon)
    if outcome.quota:
        raise CEQuotaError(ce_name, quota, reason)
    raise CERefusedError(ce_name, reason)


@contextlib.asynccontextmanager
async def open_for_submission(
    db: MyPilotDB, ce_name: str, vo: str
) -> AsyncIterator[tuple[dict[str, Any], CEBackend[Any]]]:
    """Open the back end of a compute element for a submission, after the checks that need no lock.

    Raises:
        PilotSubmissionError: a subclass for each reason.
    """
    ce = await db.get_ce(ce_name)
    if not serves(ce["vos"], vo):  # before any of its errors is shown
        raise VONotServedError(ce_name, vo)
    if ce["enabled"] and (obstacle := await submission_blocker(db, ce)) is not None:
        raise CEPausedError(ce_name, *obstacle)
    try:
        async with backend_of(ce, vo) as backend:
            if (reason := backend.unsupported_reason(vo)) is not None:
                reason = one_line(reason, MAX_REASON_CHARS)
                await db.record_ce_error(ce_name, reason)
                raise CERefusedError(ce_name, reason)
            yield ce, backend
    except CESettingsError as error:
        reason = describe_failure(ce, error)
        await record_call_failure(db, ce, CECall.SUBMIT, reason)
        raise CERefusedError(ce_name, reason, public="its settings are wrong") from error


async def claim_submission(db: MyPilotDB, ce: Mapping[str, Any]) -> None:
    """Acquire the probe of a half-open circuit, in the transaction that reserves slots.

    Raises:
        CEPausedError: another task has it.
    """
    if ce["enabled"] and not await acquire_submission(db, ce):
        raise CEPausedError(ce["name"], "another pilot probes whether it works again")


async def _reserve(
    db: MyPilotDB, ce: Mapping[str, Any], vo: str, stamp: str, begun: int | None
) -> tuple[int, PilotAtCE]:
    """Reserve a slot; return the id of the pilot, and the pilot to submit."""

    async def reserve() -> tuple[int, PilotAtCE]:
        await claim_submission(db, ce)
        pilot_id = await db.submit_pilot(ce["name"], vo=vo, stamp=stamp) if begun is None else begun
        pilot = PilotAtCE(stamp=stamp, vo=vo, maybe_submitted=begun is not None)
        return pilot_id, (await with_identities(db, ce, {stamp: pilot_id}, [pilot]))[0]

    return await db.run(reserve)


async def _is_known(db: MyPilotDB, pilot_id: int) -> bool:
    """True if the compute element has confirmed the pilot."""
    pilot = await db.get_pilot(pilot_id)
    return pilot["reference"] is not None or pilot["status"] is not MyPilotStatus.SUBMITTED


async def confirm(
    db: MyPilotDB, ce: Mapping[str, Any], backend: CEBackend[Any], pilot_id: int, pilot: PilotAtCE
) -> int:
    """Record that the compute element accepted the pilot, and return its id.

    Raises:
        CERefusedError: its slot was released meanwhile; the pilot is cancelled.
    """
    name, reference = ce["name"], str(pilot.reference)

    async def record() -> tuple[tuple[int, str] | None, int]:
        await record_call_success(db, ce, CECall.SUBMIT)
        confirmed = await db.confirm_submission(pilot_id, pilot.stamp, reference)
        if confirmed is not None:
            return confirmed, 0
        # This worker was suspended for so long that a check has released the slot. The pilot exists and takes a
        # slot beyond the capacity until the checks have cancelled it.
        return None, await db.restore_pilot(
            name, pilot.vo, stamp=pilot.stamp, reference=reference, reason=_ABANDONED
        )

    confirmed, taken = await db.run(record)
    if confirmed is None:
        over = f"; {taken} of {ce['capacity']} slots are taken" if taken > ce["capacity"] else ""
        logger.warning("Pilot %s of %s at %s %s%s", pilot.stamp, pilot.vo, name, _ABANDONED, over)
    if confirmed is not None and confirmed[1] == reference:
        logger.debug("Submitted pilot %d of %s to %s", confirmed[0], pilot.vo, name)
        return confirmed[0]
    # With another reference recorded, the stamp was submitted twice: this job is the duplicate.
    try:
        async with asyncio.timeout(rules_of(ce).timeout_seconds):
            await backend.cancel([pilot._replace(cancel_requested=True)])
    except Exception as error:
        logger.warning("Cannot cancel pilot %s at %s: %s", pilot.stamp, name, describe_failure(ce, error))
    raise CERefusedError(name, f"pilot {pilot.stamp} {_ABANDONED}")
