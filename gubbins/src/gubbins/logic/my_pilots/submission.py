"""Submit one pilot, or several ones by one call."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
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
    CEUnavailableError,
    PilotSubmissionError,
    VONotServedError,
)
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
    own = stamp or uuid.uuid4().hex
    async with open_for_submission(db, ce_name, vo) as (ce, backend):
        found = None if stamp is None else await db.find_submission(stamp)
        begun = None if found is None else found.pilot_id
        if begun is not None and found is not None and found.is_known:
            return begun

        async def reserve() -> tuple[dict[str, int], list[PilotAtCE]]:
            await claim_submission(db, ce)
            ids = {own: await db.submit_pilot(ce_name, vo=vo, stamp=own) if begun is None else begun}
            pilot = PilotAtCE(stamp=own, vo=vo, maybe_submitted=begun is not None)
            return ids, await with_identities(db, ce, ids, [pilot])

        ids, pilots = await db.run(reserve)
        outcome = (await submit_reserved(db, ce, backend, ids, pilots, own))[own]
    if isinstance(outcome, PilotSubmissionError):
        raise outcome
    return outcome


@contextlib.asynccontextmanager
async def open_for_submission(
    db: MyPilotDB, ce_name: str, vo: str
) -> AsyncIterator[tuple[dict[str, Any], CEBackend[Any]]]:
    """Open the back end of a compute element for a submission, after the checks that need no lock.

    Raises:
        PilotSubmissionError: a subclass for each reason.
    """
    ce = await db.get_ce(ce_name, vo)
    if not serves(ce["vos"], vo):  # before any of its errors is shown
        raise VONotServedError(ce_name, vo)
    if ce["enabled"] and (obstacle := submission_blocker(ce)) is not None:
        raise obstacle
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


@dataclass
class _Outcomes:
    """Outcomes of the pilots of one call, by stamp."""

    references: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    over_quota: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    """Errors after which the pilot may or may not have been accepted."""
    failure: Exception | None = None
    """Error of the call."""


async def submit_reserved(
    db: MyPilotDB,
    ce: Mapping[str, Any],
    backend: CEBackend[Any],
    ids: Mapping[str, int],
    pilots: Sequence[PilotAtCE],
    own: str,
) -> dict[str, int | PilotSubmissionError]:
    """Submit pilots that have slots by one call, and record the outcomes.

    Args:
        ids: ids of the pilots by stamp.
        own: stamp of the caller, whose refusal is not stored for another task.

    Returns:
        The id or the error of each pilot, by stamp.
    """
    name = ce["name"]
    outcomes = await _call(ce, backend, pilots)
    confirmed, quota, taken = await db.run(lambda: _record(db, ce, ids, pilots, outcomes, own))
    results: dict[str, int | PilotSubmissionError] = {}
    duplicates = []
    for pilot in pilots:
        stamp = pilot.stamp
        pilot_id, reference = confirmed.get(stamp, (0, None))
        if (own_reference := outcomes.references.get(stamp)) is None:
            if (why := outcomes.over_quota.get(stamp)) is not None:
                error: PilotSubmissionError = CEQuotaError(name, quota, why)
            else:
                reason = outcomes.refused.get(stamp) or outcomes.unknown[stamp]
                error = CERefusedError(name, reason, responded=stamp in outcomes.refused)
            error.__cause__ = outcomes.failure
            results[stamp] = error
        elif own_reference == reference:
            results[stamp] = pilot_id
        else:
            if stamp not in confirmed:
                over = f"; {taken} of {ce['capacity']} slots are taken" if taken > ce["capacity"] else ""
                logger.warning("Pilot %s of %s at %s %s%s", stamp, pilot.vo, name, _ABANDONED, over)
            # With another reference recorded, the stamp was submitted twice: this job is the duplicate.
            results[stamp] = CERefusedError(name, f"pilot {stamp} {_ABANDONED}")
            duplicates.append(pilot._replace(reference=own_reference, cancel_requested=True))
    logger.debug("Submitted %d of %d pilots to %s", len(confirmed), len(pilots), name)
    if duplicates:
        try:
            async with asyncio.timeout(rules_of(ce).timeout_seconds):
                await backend.cancel(duplicates)
        except Exception as failed:
            reason = describe_failure(ce, failed)
            logger.warning("Cannot cancel %d abandoned pilots at %s: %s", len(duplicates), name, reason)
    return results


async def _call(ce: Mapping[str, Any], backend: CEBackend[Any], pilots: Sequence[PilotAtCE]) -> _Outcomes:
    outcomes = _Outcomes()
    try:
        async with asyncio.timeout(rules_of(ce).timeout_seconds):
            response: object = await backend.submit(pilots)
        reason = backend.warning
    except Exception as error:
        response, reason, outcomes.failure = backend.outcomes, describe_failure(ce, error), error
    for stamp in (pilot.stamp for pilot in pilots):
        try:
            if reason and isinstance(response, Mapping) and stamp not in response:
                raise CEUnavailableError(reason)
            outcome = check_outcome(ce, response, stamp)
        except CEUnavailableError as error:
            outcomes.unknown[stamp] = f"{backend.warning or error}; the next checks will find out"
        else:
            if outcome.reference is not None:
                outcomes.references[stamp] = outcome.reference
            elif outcome.quota:
                outcomes.over_quota[stamp] = outcome.error or ""
            else:
                outcomes.refused[stamp] = outcome.error or "no reason given"
    return outcomes


async def _record(
    db: MyPilotDB,
    ce: Mapping[str, Any],
    ids: Mapping[str, int],
    pilots: Sequence[PilotAtCE],
    outcomes: _Outcomes,
    own: str,
) -> tuple[dict[str, tuple[int, str]], int, int]:
    """Record the outcomes of a call.

    Returns:
        Id and reference of the confirmed pilots by stamp, the quota, and the taken slots if a pilot was restored.
    """
    name, unknown, refused, references = ce["name"], outcomes.unknown, outcomes.refused, outcomes.references
    vos = {pilot.stamp: pilot.vo for pilot in pilots}
    first_error = next(iter([*unknown.values(), *refused.values()]), "")
    await db.lock_ces([name])
    if references or outcomes.over_quota:
        await record_call_success(db, ce, CECall.SUBMIT)
        if first_error:
            await db.record_ce_error(name, first_error)
    else:
        await record_call_failure(db, ce, CECall.SUBMIT, first_error, outcomes.failure)
    await db.set_submission_errors({ids[stamp]: why for stamp, why in unknown.items()})
    unused = refused | outcomes.over_quota
    # Of a repeated submission the first attempt may have been accepted.
    await db.release_pilots([ids[p.stamp] for p in pilots if p.stamp in unused and not p.maybe_submitted])
    await db.refuse_requests(name, {stamp: (vos[stamp], why) for stamp, why in refused.items() if stamp != own})
    confirmed = await db.confirm_submissions(references)
    taken = 0
    for stamp in references.keys() - confirmed.keys():
        # This worker was suspended for so long that a check has released the slot. The pilot exists and takes a
        # slot beyond the capacity until the checks have cancelled it.
        taken = await db.restore_pilot(
            name, vos[stamp], stamp=stamp, reference=references[stamp], reason=_ABANDONED
        )
    return confirmed, await db.record_quota(name, ce["circuits_of"]) if outcomes.over_quota else 0, taken
