"""Submit requested pilots in batches: the first task submits all pending requests of its compute element.

The mutex of the compute element serializes its tasks. The first one reserves slots for all pending requests,
submits their pilots by one call and records the outcomes, which the other tasks then return.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gubbins.ces import CEBackend, PilotAtCE
from gubbins.ces.registry import OF_VOS
from gubbins.db.sql import MyPilotDB
from gubbins.domain.circuit_breaker import CECall
from gubbins.domain.exceptions import CEQuotaError, CERefusedError, CEUnavailableError, PilotSubmissionError
from gubbins.domain.rules import rules_of, serves

from .ce_calls import describe_failure
from .circuits import half_open, quota_limit, record_call_failure, record_call_success
from .identity import with_identities
from .response_validation import check_outcome
from .submission import claim_submission, confirm, open_for_submission, submit_pilot

logger = logging.getLogger(__name__)

_FIND_OUT = "the next checks will find out"

#: Outcomes by stamp, for other tasks of this process; those of other processes read them in the database.
_outcomes: dict[str, int | PilotSubmissionError | None] = {}
_MOST_OUTCOMES = 10_000


async def submit_requested_pilot(db: MyPilotDB, ce_name: str, vo: str, *, stamp: str | None = None) -> int | None:
    """Submit a pilot requested by `request_pilots`, with all pending requests of its compute element.

    The request is deleted in the transaction that reserves its slot. An interrupted submission is resumed.

    Args:
        stamp: stamp of the request; None: the oldest pending one of the VO.

    Returns:
        The id of the pilot; None: the request has expired, or there was no slot for it.

    Raises:
        PilotSubmissionError: as `submit_pilot`.
    """
    if stamp in _outcomes:
        outcome = _outcomes.pop(stamp)
        if isinstance(outcome, PilotSubmissionError):
            await db.delete_requests(ce_name, [stamp])
            raise outcome
        return outcome
    if stamp is None:
        waiting = await db.waiting_requests(ce_name, vo=vo, at_most=1)
        stamp = waiting[0][0] if waiting else ""
    found = await db.find_submission(stamp)
    if found is None:
        logger.info("No pilot for %s at %s: its request has expired, or there was no room for it", vo, ce_name)
        return None
    if found.is_known:
        return found.pilot_id
    if found.error is not None:
        if found.pilot_id is None:
            await db.delete_requests(ce_name, [stamp])
        raise CERefusedError(ce_name, found.error, responded=found.pilot_id is None)
    if found.pilot_id is not None:
        return await submit_pilot(db, ce_name, vo, stamp=stamp)
    try:
        async with open_for_submission(db, ce_name, vo) as (ce, backend):
            return await _Batch(db, ce, backend, vo, stamp).submit()
    except PilotSubmissionError:
        await db.delete_requests(ce_name, [stamp])
        raise


@dataclass
class _Outcomes:
    """Outcomes of the pilots of one call, by stamp."""

    references: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    over_quota: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    """Errors after which the pilot may or may not have been accepted."""


@dataclass
class _Batch:
    """The pilots of one call."""

    db: MyPilotDB
    ce: dict[str, Any]
    backend: CEBackend[Any]
    vo: str
    own: str
    """Stamp of the task that submits the batch."""

    async def submit(self) -> int | None:
        """Submit all, and return the id of the own pilot; None: its request has expired.

        Raises:
            PilotSubmissionError: the own pilot was not submitted.
        """
        ids, pilots, refused = await self.db.run(self._reserve)
        if refused:
            logger.info(
                "No slots for %d pilots at %s: %s", len(refused), self.ce["name"], next(iter(refused.values()))
            )
        failed: dict[str, PilotSubmissionError] = await self._call(ids, pilots) if pilots else {}
        _outcomes.update(dict.fromkeys(refused) | ids | failed)
        _outcomes.pop(self.own, None)
        while len(_outcomes) > _MOST_OUTCOMES:
            del _outcomes[next(iter(_outcomes))]
        if (error := refused.get(self.own) or failed.get(self.own)) is not None:
            raise error
        return ids.get(self.own)

    async def _reserve(self) -> tuple[dict[str, int], list[PilotAtCE], dict[str, PilotSubmissionError]]:
        """Reserve slots for the pending requests; for none if the own one has expired."""
        db, name = self.db, self.ce["name"]
        is_probe = half_open(self.ce)
        at_most = 1 if is_probe else rules_of(self.ce).max_batch
        if (limit := quota_limit(self.ce)) is not None:
            at_most = max(1, min(at_most, limit - await db.count_active(name)))
        # VOs with their own settings are not combined: the call uses the credentials of one VO.
        alone = self.vo if OF_VOS in self.ce["settings"] else None
        waiting = dict(await db.waiting_requests(name, vo=alone, at_most=at_most))
        if self.own not in waiting:
            if (found := await db.find_submission(self.own)) is None or found.pilot_id or found.error:
                return {}, [], {}
            waiting = {self.own: self.vo, **dict(list(waiting.items())[: at_most - 1])}
        await claim_submission(db, self.ce)
        # Requests of VOs that are refused here stay for their own tasks.
        vos = {
            vo
            for vo in waiting.values()
            if serves(self.ce["vos"], vo) and self.backend.unsupported_reason(vo) is None
        }
        ids, refused = await db.submit_requested(name, [each for each in waiting.items() if each[1] in vos])
        if is_probe and not ids:
            raise refused[self.own]  # rolls back the probe
        pilots = [PilotAtCE(stamp=s, vo=vo, maybe_submitted=False) for s, vo in waiting.items() if s in ids]
        return ids, await with_identities(db, self.ce, ids, pilots), refused

    async def _call(self, ids: Mapping[str, int], pilots: list[PilotAtCE]) -> dict[str, PilotSubmissionError]:
        """Submit pilots that have slots, and record the outcomes. Returns the errors by stamp."""
        name, failure = self.ce["name"], None
        try:
            async with asyncio.timeout(rules_of(self.ce).timeout_seconds):
                response: object = await self.backend.submit(pilots)
            reason = self.backend.warning
        except Exception as error:
            response, reason, failure = self.backend.outcomes, describe_failure(self.ce, error), error
        outcomes = self._outcomes(pilots, response, reason)
        unknown, refused, references = outcomes.unknown, outcomes.refused, outcomes.references
        first_error = next(iter([*unknown.values(), *refused.values()]), "")

        async def record() -> tuple[set[str], int]:
            await self.db.lock_ces([name])
            if references or outcomes.over_quota:
                await record_call_success(self.db, self.ce, CECall.SUBMIT)
                if first_error:
                    await self.db.record_ce_error(name, first_error)
            else:
                await record_call_failure(self.db, self.ce, CECall.SUBMIT, first_error, failure)
            await self.db.set_submission_errors({ids[stamp]: why for stamp, why in unknown.items()})
            await self.db.release_pilots([ids[stamp] for stamp in [*refused, *outcomes.over_quota]])
            vos = {pilot.stamp: pilot.vo for pilot in pilots}
            await self.db.refuse_requests(
                name, {stamp: (vos[stamp], why) for stamp, why in refused.items() if stamp != self.own}
            )
            confirmed = await self.db.confirm_submissions(
                {ids[s]: (s, reference) for s, reference in references.items()}
            )
            return confirmed, await self.db.record_quota(name) if outcomes.over_quota else 0

        confirmed, quota = await self.db.run(record)
        logger.debug("Submitted %d of %d pilots to %s", len(confirmed), len(pilots), name)
        failed: dict[str, PilotSubmissionError] = {
            **{stamp: CERefusedError(name, why) for stamp, why in refused.items()},
            **{stamp: CERefusedError(name, why, responded=False) for stamp, why in unknown.items()},
            **{stamp: CEQuotaError(name, quota, why) for stamp, why in outcomes.over_quota.items()},
        }
        for pilot in pilots:
            if pilot.stamp in references and pilot.stamp not in confirmed:
                try:
                    its = pilot._replace(reference=references[pilot.stamp])
                    await confirm(self.db, self.ce, self.backend, ids[pilot.stamp], its)
                except CERefusedError as error:
                    failed[pilot.stamp] = error
        return failed

    def _outcomes(self, pilots: list[PilotAtCE], response: object, reason: str | None) -> _Outcomes:
        """Sort the outcomes of a call; `reason` is that of the missing ones."""
        outcomes = _Outcomes()
        for stamp in (pilot.stamp for pilot in pilots):
            try:
                if reason and isinstance(response, Mapping) and stamp not in response:
                    raise CEUnavailableError(reason)
                outcome = check_outcome(self.ce, response, stamp)
            except CEUnavailableError as error:
                outcomes.unknown[stamp] = f"{self.backend.warning or error}; {_FIND_OUT}"
            else:
                if outcome.reference is not None:
                    outcomes.references[stamp] = outcome.reference
                elif outcome.quota:
                    outcomes.over_quota[stamp] = outcome.error or ""
                else:
                    outcomes.refused[stamp] = outcome.error or "no reason given"
        return outcomes
