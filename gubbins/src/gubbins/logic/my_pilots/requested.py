"""Submit requested pilots in batches: the first task submits all pending requests of its compute element.

The mutex of the compute element serializes its tasks. The first one reserves slots for all pending requests,
submits their pilots by one call and records the outcomes, which the other tasks then return.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from gubbins.ces import CEBackend, PilotAtCE
from gubbins.db.sql import MyPilotDB
from gubbins.domain.exceptions import CERefusedError, PilotSubmissionError
from gubbins.domain.rules import OF_VOS, rules_of, serves

from .circuits import half_open, quota_limit
from .identity import with_identities
from .submission import claim_submission, open_for_submission, submit_pilot, submit_reserved

logger = logging.getLogger(__name__)

#: Ids of submitted pilots by stamp, for the other tasks of this process: a read for each would halve their rate.
_submitted: dict[str, int] = {}
_MAX_SUBMITTED = 10_000


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
    if (pilot_id := _submitted.pop(stamp, None)) is not None:
        return pilot_id
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
            ids, pilots, refused = await db.run(lambda: _reserve(db, ce, backend, vo, stamp))
            if refused:
                reason = next(iter(refused.values()))
                logger.info("No slots for %d pilots at %s: %s", len(refused), ce_name, reason)
            outcomes = await submit_reserved(db, ce, backend, ids, pilots, stamp) if pilots else {}
        outcome = refused.get(stamp) or outcomes.pop(stamp, None)
        _submitted.update((other, id) for other, id in outcomes.items() if isinstance(id, int))
        while len(_submitted) > _MAX_SUBMITTED:
            del _submitted[next(iter(_submitted))]
        if isinstance(outcome, PilotSubmissionError):
            raise outcome
    except PilotSubmissionError:
        await db.delete_requests(ce_name, [stamp])
        raise
    return outcome


async def _reserve(
    db: MyPilotDB, ce: Mapping[str, Any], backend: CEBackend[Any], vo: str, own: str
) -> tuple[dict[str, int], list[PilotAtCE], dict[str, PilotSubmissionError]]:
    """Reserve slots for the pending requests; for none if the own one, given by stamp, has expired."""
    is_probe = half_open(ce)
    at_most = 1 if is_probe else rules_of(ce).max_batch
    if (limit := quota_limit(ce)) is not None:
        at_most = max(1, min(at_most, limit - await db.count_active(ce["name"], ce["circuits_of"] or None)))
    # VOs with their own settings are not combined: the call uses the credentials of one VO.
    alone = vo if OF_VOS in ce["settings"] else None
    waiting = dict(await db.waiting_requests(ce["name"], vo=alone, at_most=at_most))
    if own not in waiting:
        if (found := await db.find_submission(own)) is None or found.pilot_id or found.error:
            return {}, [], {}
        waiting = {own: vo, **dict(list(waiting.items())[: at_most - 1])}
    await claim_submission(db, ce)
    # Requests of VOs that are refused here stay for their own tasks.
    served = {each for each in waiting.values() if serves(ce["vos"], each)}
    vos = {each for each in served if backend.unsupported_reason(each) is None}
    ids, refused = await db.submit_requested(ce["name"], [each for each in waiting.items() if each[1] in vos])
    if is_probe and not ids:
        raise refused[own]  # rolls back the probe
    pilots = [PilotAtCE(stamp=s, vo=vo, maybe_submitted=False) for s, vo in waiting.items() if s in ids]
    return ids, await with_identities(db, ce, ids, pilots), refused
