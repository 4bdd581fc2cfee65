"""Submit requested pilots: one call for all that wait at a compute element, by the task that comes first.

The tasks of a compute element take turns by its mutex. The first one reserves slots for its own request and for
those that wait behind it, submits all these pilots by one call, and records the outcome of each. The others find
theirs.
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
from .circuits import half_open, note_failure, note_success, quota_limit
from .identity import with_identities
from .response_validation import check_outcome
from .submission import claim_submission, confirm, open_for_submission, submit_pilot

logger = logging.getLogger(__name__)

_FIND_OUT = "the next checks will find out"

#: Outcomes by stamp for the tasks of this process that wait behind; those of others read them in the database.
_outcomes: dict[str, int | PilotSubmissionError | None] = {}
_MOST_OUTCOMES = 10_000


async def submit_requested_pilot(db: MyPilotDB, ce_name: str, vo: str, *, stamp: str | None = None) -> int | None:
    """Submit a pilot that `request_pilots` asked for, and those that wait behind it; return its id.

    Its request is deleted in the transaction that reserves its slot, so that no other submission takes it in
    between. None where there is no request any more, and nothing is submitted; or where it was found that there is
    no room for it. A submission that was begun and not brought to its end (the worker died) is taken up again.

    Args:
        db: the database.
        ce_name: where.
        vo: whose.
        stamp: that of the request; None: the oldest one of the VO that waits.

    Raises:
        PilotSubmissionError: as by `submit_pilot`.
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
        raise CERefusedError(ce_name, found.error, answered=found.pilot_id is None)
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
    """Reasons for which nobody knows."""


@dataclass
class _Batch:
    """The pilots of one call."""

    db: MyPilotDB
    ce: dict[str, Any]
    backend: CEBackend[Any]
    vo: str
    own: str
    """The stamp whose task this is."""

    async def submit(self) -> int | None:
        """Submit all, and return the id of the own pilot; None: its request is gone.

        Raises:
            PilotSubmissionError: why there is no own pilot.
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
        """Reserve slots for the requests that wait; for none, where the own one is gone."""
        db, name = self.db, self.ce["name"]
        is_probe = half_open(self.ce)
        at_most = 1 if is_probe else rules_of(self.ce).max_batch
        if (limit := quota_limit(self.ce)) is not None:
            at_most = max(1, min(at_most, limit - await db.count_active(name)))
        # VOs with settings of their own are not combined: it would be with the credentials of another.
        alone = self.vo if OF_VOS in self.ce["settings"] else None
        waiting = dict(await db.waiting_requests(name, vo=alone, at_most=at_most))
        if self.own not in waiting:
            if (found := await db.find_submission(self.own)) is None or found.pilot_id or found.error:
                return {}, [], {}
            waiting = {self.own: self.vo, **dict(list(waiting.items())[: at_most - 1])}
        await claim_submission(db, self.ce)
        # What others' VOs are refused for is said to their own tasks.
        vos = {vo for vo in waiting.values() if serves(self.ce["vos"], vo) and self.backend.why_not(vo) is None}
        ids, refused = await db.submit_requested(name, [each for each in waiting.items() if each[1] in vos])
        if is_probe and not ids:
            raise refused[self.own]  # nothing is claimed, then
        pilots = [PilotAtCE(stamp=s, vo=vo, maybe_submitted=False) for s, vo in waiting.items() if s in ids]
        return ids, await with_identities(db, self.ce, ids, pilots), refused

    async def _call(self, ids: Mapping[str, int], pilots: list[PilotAtCE]) -> dict[str, PilotSubmissionError]:
        """Submit pilots that have slots, and record the outcome of each. Returns why some were not submitted."""
        name = self.ce["name"]
        try:
            async with asyncio.timeout(rules_of(self.ce).timeout_seconds):
                answer: object = await self.backend.submit(pilots)
        except Exception as error:
            reason = describe_failure(self.ce, error)
            outcomes = _Outcomes(unknown={pilot.stamp: f"{reason}; {_FIND_OUT}" for pilot in pilots})
        else:
            outcomes = self._outcomes(pilots, answer)
        unknown, refused, references = outcomes.unknown, outcomes.refused, outcomes.references
        said = next(iter([*unknown.values(), *refused.values()]), "")

        async def record() -> tuple[set[str], int]:
            await self.db.lock_ces([name])
            if references or outcomes.over_quota:
                await note_success(self.db, self.ce, CECall.SUBMIT)
                if said:
                    await self.db.record_ce_error(name, said)
            else:
                await note_failure(self.db, self.ce, CECall.SUBMIT, said)
            await self.db.note_unconfirmed({ids[stamp]: why for stamp, why in unknown.items()})
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
            **{stamp: CERefusedError(name, why, answered=False) for stamp, why in unknown.items()},
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

    def _outcomes(self, pilots: list[PilotAtCE], answer: object) -> _Outcomes:
        outcomes = _Outcomes()
        for stamp in (pilot.stamp for pilot in pilots):
            try:
                outcome = check_outcome(self.ce, answer, stamp)
            except CEUnavailableError as error:
                outcomes.unknown[stamp] = f"{error}; {_FIND_OUT}"
            else:
                if outcome.reference is not None:
                    outcomes.references[stamp] = outcome.reference
                elif outcome.quota:
                    outcomes.over_quota[stamp] = outcome.error or ""
                else:
                    outcomes.refused[stamp] = outcome.error or "no reason given"
        return outcomes
