"""Follow the pilots of one VO: ask their compute elements, and move each at most one step (P61)."""

from __future__ import annotations

__all__ = ["transition_pilot_states"]

import asyncio
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from gubbins.ces import Observation, Observed, PilotAtCE
from gubbins.db.sql import MyPilotDB
from gubbins.pilot_states import MyPilotStatus

from .backends import CE_TIMEOUT_SECONDS, backend_of, describe_failure

logger = logging.getLogger(__name__)

UNCONFIRMED_GRACE = timedelta(minutes=10)
"""A submission that was never confirmed, and that the compute element does not know, is undone after this."""

LOST_AFTER = timedelta(hours=1)
"""A pilot that its compute element has not known for this long has failed."""

_ENDS = {Observed.DONE: MyPilotStatus.DONE, Observed.FAILED: MyPilotStatus.FAILED}


@dataclass
class _Findings:
    """What a check will write down, for all compute elements together."""

    moves: dict[MyPilotStatus, list[tuple[int, str | None]]] = field(default_factory=lambda: defaultdict(list))
    confirmed: list[tuple[int, str]] = field(default_factory=list)
    gone_missing: list[int] = field(default_factory=list)
    found_again: list[int] = field(default_factory=list)
    never_submitted: list[int] = field(default_factory=list)
    ended: dict[str, dict[str, MyPilotStatus]] = field(default_factory=lambda: defaultdict(dict))


async def transition_pilot_states(db: MyPilotDB, vo: str) -> dict[MyPilotStatus, int]:
    """Move the VO's pilots on, and return how many entered each state.

    A handful of statements, whatever the number of pilots (P62), and no transaction while compute elements
    are being asked. A pilot makes one step towards what its compute element says: one that has already
    ended when it is first seen is RUNNING after this check and at its end after the next. A compute element
    that cannot be asked keeps its pilots as they are, and the complaint.
    """
    pilots = await db.get_active_pilots(vo=vo)
    if not pilots:
        return {}
    by_ce: dict[str, list[Any]] = defaultdict(list)
    for pilot in pilots:
        by_ce[pilot.ce_name].append(pilot)
    ces = {ce["name"]: ce for ce in await db.list_ces(vo=None) if ce["name"] in by_ce}
    answers = await asyncio.gather(
        *(_ask(ces[name], vo, mine) for name, mine in by_ce.items()), return_exceptions=True
    )

    findings = _Findings()
    complaints: dict[str, str | None] = {}
    now = datetime.now(tz=UTC)
    for (name, mine), answer in zip(by_ce.items(), answers, strict=True):
        if isinstance(answer, Exception):
            complaints[name] = describe_failure(answer)
            logger.warning("Cannot check the pilots of %s at %s: %s", vo, name, complaints[name])
        elif isinstance(answer, BaseException):
            raise answer
        else:
            _judge(mine, answer, now, findings)
            if ces[name]["last_error"] is not None:
                complaints[name] = None

    async with db.unit():
        counts = await db.advance_pilots(findings.moves, vo=vo)
        await db.confirm_pilots(findings.confirmed)
        await db.set_pilots_missing(findings.gone_missing, now)
        await db.set_pilots_missing(findings.found_again, None)
        if await db.release_pilots(findings.never_submitted):
            logger.warning("Undid submissions of %s that were never confirmed: %s", vo, findings.never_submitted)
        for name, complaint in complaints.items():
            await db.record_ce_error(name, complaint)
    await asyncio.gather(*(_forget(ces[name], ended) for name, ended in findings.ended.items()))
    return counts


async def _ask(ce: Mapping[str, Any], vo: str, pilots: Sequence[Any]) -> Mapping[str, Observation]:
    described = [
        PilotAtCE(
            pilot.stamp,
            vo,
            pilot.reference,
            pilot.status,
            pilot.submitted_at,
            pilot.started_at,
            pilot.cancel_requested_at is not None,
        )
        for pilot in pilots
    ]
    async with asyncio.timeout(CE_TIMEOUT_SECONDS), backend_of(ce) as backend:
        # A cancellation is asked for again until the pilot has ended: the first request may have been lost.
        if to_cancel := [pilot for pilot in described if pilot.cancel_requested]:
            await backend.cancel(to_cancel)
        return await backend.poll(described)


def _judge(
    pilots: Sequence[Any], observations: Mapping[str, Observation], now: datetime, findings: _Findings
) -> None:
    for pilot in pilots:
        seen = observations.get(pilot.stamp)
        if seen is None:
            _judge_unknown(pilot, now, findings)
            continue
        if seen.state is Observed.NO_NEWS:
            continue
        if pilot.missing_since is not None:
            findings.found_again.append(pilot.pilot_id)
        if pilot.reference is None and seen.reference is not None:
            findings.confirmed.append((pilot.pilot_id, seen.reference))
        if pilot.status is MyPilotStatus.SUBMITTED:
            if seen.state is not Observed.WAITING:
                findings.moves[MyPilotStatus.RUNNING].append((pilot.pilot_id, None))
        elif (end := _ENDS.get(seen.state)) is not None:
            findings.moves[end].append((pilot.pilot_id, seen.reason))
            findings.ended[pilot.ce_name][pilot.stamp] = end


def _judge_unknown(pilot: Any, now: datetime, findings: _Findings) -> None:
    """The compute element does not know the pilot: that is not an end, but it cannot go on for ever."""
    if pilot.status is MyPilotStatus.SUBMITTED and pilot.reference is None:
        if now - pilot.submitted_at > UNCONFIRMED_GRACE:
            findings.never_submitted.append(pilot.pilot_id)
    elif pilot.missing_since is None:
        findings.gone_missing.append(pilot.pilot_id)
    elif now - pilot.missing_since > LOST_AFTER:
        if pilot.status is MyPilotStatus.SUBMITTED:
            # The only way to an end leads through RUNNING; `missing_since` starts anew there.
            findings.moves[MyPilotStatus.RUNNING].append((pilot.pilot_id, "unknown to its compute element"))
        else:
            reason = f"unknown to its compute element since {pilot.missing_since:%Y-%m-%d %H:%M:%S} UTC"
            findings.moves[MyPilotStatus.FAILED].append((pilot.pilot_id, reason))
            findings.ended[pilot.ce_name][pilot.stamp] = MyPilotStatus.FAILED


async def _forget(ce: Mapping[str, Any], ended: Mapping[str, MyPilotStatus]) -> None:
    """Tidying up only: what fails here is not worth failing a check that is already recorded."""
    try:
        async with asyncio.timeout(CE_TIMEOUT_SECONDS), backend_of(ce) as backend:
            await backend.forget(ended)
    except Exception as error:
        logger.warning("Cannot tidy up after pilots at %s: %s", ce["name"], describe_failure(error))
