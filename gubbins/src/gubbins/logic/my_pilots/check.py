"""Check the pilots of one VO: poll their compute elements, and move each at most one step (P61)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any, TypeAlias

from gubbins.ces import Observation, Observed, PilotAtCE
from gubbins.db.sql import MyPilotDB
from gubbins.domain import clock
from gubbins.domain.circuit_breaker import CECall
from gubbins.domain.exceptions import CEUnavailableError
from gubbins.domain.pilot_states import CANCELLED_FOR, MyPilotStatus
from gubbins.domain.rules import CERules, rules_of

from .ce_calls import backend_of, describe_failure
from .circuits import may_call, note_failure, note_success
from .outputs import ends_with_output
from .response_validation import check_observations

logger = logging.getLogger(__name__)

PROMPT_SECONDS = 2
"""Responses are recorded after so long, without waiting for slower compute elements.

Cleaning up at compute elements gets so much time after the last response, and no more.
"""

CYCLE_SECONDS = 30
"""Compute elements that have responded are polled again after that, while others keep the check from ending."""

_ENDS = {Observed.DONE: MyPilotStatus.DONE, Observed.FAILED: MyPilotStatus.FAILED}


@dataclass(frozen=True)
class PollResult:
    """Response of one compute element."""

    observations: Mapping[str, Observation]
    warning: str | None  # what did not work beside the poll, which succeeded


@dataclass(frozen=True)
class PollRequest:
    """A poll of one compute element about pilots of a VO."""

    ce: Mapping[str, Any]
    vo: str
    pilots: Sequence[Any]

    @cached_property
    def ends_with_output(self) -> frozenset[MyPilotStatus]:
        """The ends at which output is to be fetched; computed once, for many may end at a time."""
        return ends_with_output(self.ce)

    def described(self, pilot: Any) -> PilotAtCE:
        """One of the pilots, as it is sent to the compute element."""
        return PilotAtCE(
            pilot.stamp,
            self.vo,
            pilot.reference,
            pilot.status,
            pilot.submitted_at,
            pilot.started_at,
            pilot.cancel_requested_at is not None,
        )


@dataclass
class StatusChanges:
    """State changes that a check records, for all compute elements that have responded."""

    moves: dict[MyPilotStatus, list[tuple[int, str | None]]] = field(default_factory=lambda: defaultdict(list))
    confirmed: list[tuple[int, str]] = field(default_factory=list)
    gone_missing: list[int] = field(default_factory=list)
    found_again: list[int] = field(default_factory=list)
    never_submitted: list[int] = field(default_factory=list)
    ended: dict[str, list[PilotAtCE]] = field(default_factory=lambda: defaultdict(list))  # by compute element
    outputs: list[int] = field(default_factory=list)
    unseen: Counter[str] = field(default_factory=Counter)  # gone missing before they were seen; by compute element
    waiting: list[tuple[int, str | None]] = field(default_factory=list)  # with what they wait for now
    overdue: list[tuple[int, str | None]] = field(
        default_factory=list
    )  # to be cancelled, with the rule as the reason
    alive: set[str] = field(default_factory=set)  # compute elements whose pilots have moved, or were found again

    def end(self, request: PollRequest, pilot: Any, status: MyPilotStatus, reason: str | None) -> None:
        """The pilot has ended so."""
        if status is MyPilotStatus.FAILED and (pilot.last_error or "").startswith(CANCELLED_FOR):
            reason = pilot.last_error
        self.moves[status].append((pilot.pilot_id, reason))
        if status in request.ends_with_output:
            self.outputs.append(pilot.pilot_id)  # cleaned up when that is stored
        else:
            self.ended[request.ce["name"]].append(request.described(pilot)._replace(status=status))


_Polls: TypeAlias = dict[asyncio.Task[PollResult], PollRequest]


async def transition_pilot_states(
    db: MyPilotDB, vo: str, *, prompt_seconds: float = PROMPT_SECONDS, cycle_seconds: float = CYCLE_SECONDS
) -> dict[MyPilotStatus, int]:
    """Move the VO's pilots on, and return how many entered each state.

    A constant number of statements (P62), and no transaction while compute elements
    are being polled: all of them at once, and a slow one does not delay the responses of the others. While
    it lasts for longer than a cycle, the others are polled again, as if it were not there.

    In each cycle a pilot makes one step towards what its compute element says: one that has already ended
    when it is first seen is RUNNING then, and at its end in the next. The pilots of a compute element that does
    not respond stay as they are, and its error is recorded. One that is banned, or paused because it failed too
    often, is not polled.
    """
    counts: Counter[MyPilotStatus] = Counter()
    asked = await _ask_all(db, vo, ())
    first = frozenset(asked)  # the check lasts as long as these do; those polled again do not prolong it
    again_at = time.monotonic() + cycle_seconds
    tidying: list[asyncio.Task[None]] = []
    try:
        while asked:
            answered, _ = await asyncio.wait(asked, timeout=prompt_seconds)
            if answered:
                requests = {task: asked.pop(task) for task in answered}
                changes, entered = await _note(db, vo, requests)
                counts.update(entered)
                ces = {request.ce["name"]: request.ce for request in requests.values()}
                tidying += [asyncio.create_task(_cleanup(ces[name], e)) for name, e in changes.ended.items()]
            if time.monotonic() >= again_at and not first.isdisjoint(asked):
                asked |= await _ask_all(db, vo, [request.ce["name"] for request in asked.values()])
                again_at = time.monotonic() + cycle_seconds
        if tidying:
            await asyncio.wait(tidying, timeout=prompt_seconds)
    finally:
        for task in (*asked, *tidying):
            task.cancel()
        await asyncio.gather(*asked, *tidying, return_exceptions=True)
    return dict(counts)


async def _ask_all(db: MyPilotDB, vo: str, all_but: Collection[str]) -> _Polls:
    """Begin to poll the compute elements that have pilots of the VO, except those of these names."""
    by_ce: dict[str, list[Any]] = defaultdict(list)
    for pilot in await db.get_active_pilots(vo=vo):
        if pilot.ce_name not in all_but:
            by_ce[pilot.ce_name].append(pilot)
    if not by_ce:
        return {}
    requests = [
        PollRequest(ce, vo, by_ce[ce["name"]])
        for ce in await db.get_ces()
        if ce["name"] in by_ce and await may_call(db, ce, CECall.STATUS)
    ]
    return {asyncio.create_task(_ask(request)): request for request in requests}


async def _ask(request: PollRequest) -> PollResult:
    ce = request.ce
    described = [request.described(pilot) for pilot in request.pilots]
    seconds = rules_of(ce).timeout_seconds
    async with backend_of(ce, request.vo) as backend:
        # A cancellation is repeated until the pilot has ended: the first request may have been lost.
        if to_cancel := [pilot for pilot in described if pilot.cancel_requested]:
            try:
                async with asyncio.timeout(seconds):
                    await backend.cancel(to_cancel)
            except Exception as error:
                backend.warn(f"cannot cancel {len(to_cancel)} pilots: {describe_failure(ce, error)}")
        async with asyncio.timeout(seconds):
            answer = await backend.poll(described)
        checked = check_observations(ce, answer, (pilot.stamp for pilot in described))
        return PollResult(checked, backend.warning)


async def _note(db: MyPilotDB, vo: str, answered: _Polls) -> tuple[StatusChanges, dict[MyPilotStatus, int]]:
    """Record the responses of these compute elements in one transaction.

    Returns:
        The changes, and the number of pilots that entered each state.
    """
    changes = StatusChanges()
    failures: dict[str, str] = {}
    warnings: dict[str, str | None] = {}
    ces = {request.ce["name"]: request.ce for request in answered.values()}
    now = clock.now()
    for task, request in answered.items():
        name = request.ce["name"]
        error = CEUnavailableError("its back end was cancelled") if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            failures[name] = describe_failure(request.ce, error)
            logger.warning("Cannot check the pilots of %s at %s: %s", vo, name, failures[name])
        elif error is not None:
            raise error
        else:
            answer = task.result()
            warnings[name] = answer.warning
            _evaluate(request, answer.observations, now, changes)

    async def write() -> tuple[dict[MyPilotStatus, int], int]:
        await db.lock_ces(ces)
        entered = await db.advance_pilots(changes.moves, vo=vo)
        await db.queue_outputs(changes.outputs)
        await db.confirm_pilots(changes.confirmed)
        await db.set_pilots_missing(changes.gone_missing, now)
        await db.set_pilots_missing(changes.found_again, None)
        await db.set_waiting_reasons(changes.waiting)
        await db.request_cancels(changes.overdue)
        released = await db.release_pilots(changes.never_submitted)
        for name in sorted(warnings):
            if changes.unseen[name] or (name in changes.alive and ces[name]["missing_in_row"]):
                await db.count_missing(name, changes.unseen[name], any_seen=name in changes.alive)
        for name in sorted({*failures, *warnings}):
            if name in failures:
                await note_failure(db, ces[name], CECall.STATUS, failures[name])
                continue
            # A response to a poll is a success, although not all may have worked there.
            await note_success(db, ces[name], CECall.STATUS)
            if (warning := warnings[name]) is not None:
                await db.record_ce_error(name, warning)
        return entered, released

    entered, released = await db.run(write)
    if released:
        logger.warning("Undid submissions of %s that were never confirmed: %s", vo, changes.never_submitted)
    return changes, entered


def _evaluate(
    request: PollRequest, observations: Mapping[str, Observation], now: datetime, changes: StatusChanges
) -> None:
    rules = rules_of(request.ce)
    for pilot in request.pilots:
        seen = observations.get(pilot.stamp)
        if seen is None:
            _evaluate_unknown(request, pilot, now, rules, changes)
            continue
        if seen.state is Observed.NO_NEWS:
            continue
        if pilot.missing_since is not None:
            changes.found_again.append(pilot.pilot_id)
        if pilot.missing_since is not None or seen.state is not Observed.WAITING:
            changes.alive.add(request.ce["name"])
        if pilot.reference is None and seen.reference is not None:
            changes.confirmed.append((pilot.pilot_id, seen.reference))
        if pilot.cancel_requested_at is None and (why := _overdue(pilot, seen, rules, now)) is not None:
            changes.overdue.append((pilot.pilot_id, why))
        if pilot.status is MyPilotStatus.SUBMITTED:
            if seen.state is Observed.WAITING:
                if seen.reason != pilot.waiting_reason:
                    changes.waiting.append((pilot.pilot_id, seen.reason))
            else:
                changes.moves[MyPilotStatus.RUNNING].append((pilot.pilot_id, None))
        elif (end := _ENDS.get(seen.state)) is not None:
            changes.end(request, pilot, end, seen.reason)


def _overdue(pilot: Any, seen: Observation, rules: CERules, now: datetime) -> str | None:
    """The reason to cancel a pilot that has waited, or run, for longer than the rules allow."""
    hours = rules.max_waiting_hours
    # The site may be behind what the pilot itself has said.
    waits = seen.state is Observed.WAITING and pilot.status is MyPilotStatus.SUBMITTED
    if waits and hours and now - pilot.submitted_at > timedelta(hours=hours):
        return f"{CANCELLED_FOR}it waited longer than {hours:g} h{f' ({seen.reason})' if seen.reason else ''}"
    hours, since = rules.max_running_hours, pilot.started_at
    if seen.state is Observed.RUNNING and hours and since and now - since > timedelta(hours=hours):
        return f"{CANCELLED_FOR}it ran longer than {hours:g} h"
    return None


def _evaluate_unknown(
    request: PollRequest, pilot: Any, now: datetime, rules: CERules, changes: StatusChanges
) -> None:
    """Handle a pilot that the compute element does not know: that is no end, but it cannot go on for ever."""
    if pilot.status is MyPilotStatus.SUBMITTED and pilot.reference is None:
        if now - pilot.submitted_at > timedelta(seconds=rules.unconfirmed_seconds):
            changes.never_submitted.append(pilot.pilot_id)
    elif pilot.missing_since is None:
        changes.gone_missing.append(pilot.pilot_id)
        changes.unseen[request.ce["name"]] += pilot.status is MyPilotStatus.SUBMITTED
    elif now - pilot.missing_since > timedelta(seconds=rules.lost_seconds):
        if pilot.status is MyPilotStatus.SUBMITTED:
            # The only way to an end leads through RUNNING: it stays missing there, and the next check ends it.
            changes.moves[MyPilotStatus.RUNNING].append((pilot.pilot_id, "unknown to its compute element"))
        else:
            reason = f"unknown to its compute element since {pilot.missing_since:%Y-%m-%d %H:%M:%S} UTC"
            changes.end(request, pilot, MyPilotStatus.FAILED, reason)


async def _cleanup(ce: Mapping[str, Any], ended: Sequence[PilotAtCE]) -> None:
    """Clean up after ended pilots; a failure is only logged, for the check is already recorded."""
    try:
        async with backend_of(ce, ended[0].vo) as backend, asyncio.timeout(rules_of(ce).timeout_seconds):
            await backend.cleanup(ended)
    except Exception as error:
        logger.warning("Cannot clean up after pilots at %s: %s", ce["name"], describe_failure(ce, error))
