"""Submit requested pilots in batches: the first task submits all pending requests of its compute element.

The mutex of the compute element serializes its tasks. The first one reserves slots for all pending requests,
submits their pilots by one call and records the outcomes, which the other tasks then return.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from gubbins.ces import CEBackend, PilotAtCE
from gubbins.ces.registry import OF_VOS
from gubbins.db.sql import MyPilotDB
from gubbins.domain.exceptions import CERefusedError, PilotSubmissionError
from gubbins.domain.rules import rules_of, serves

from .circuits import half_open, quota_limit
from .identity import with_identities
from .submission import claim_submission, open_for_submission, submit_pilot, submit_reserved

logger = logging.getLogger(__name__)


async def submit_requested_pilot(db: MyPilotDB, ce_name: str, vo: str, *, stamp: str) -> int | None:
    """Submit a pilot requested by `request_pilots`, with all pending requests of its compute element.

    The request is deleted in the transaction that reserves its slot. An interrupted submission is resumed.

    Args:
        stamp: stamp of the request.

    Returns:
        The id of the pilot; None: the request has expired, or there was no slot for it.

    Raises:
        PilotSubmissionError: as `submit_pilot`.
    """
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
        outcomes = await submit_reserved(self.db, self.ce, self.backend, ids, pilots, self.own) if pilots else {}
        own = refused.get(self.own) or outcomes.get(self.own)
        if isinstance(own, PilotSubmissionError):
            raise own
        return own

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
