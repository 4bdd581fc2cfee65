"""Check the pilots of one VO: poll their compute elements, and move each at most one step."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any, TypeAlias

from gubbins.ces import Observation, Observed, PilotAtCE
from gubbins.db.sql import MyPilotDB
from gubbins.db.sql.pilots import ActivePilot
from gubbins.domain import clock
from gubbins.domain.circuit_breaker import CECall
from gubbins.domain.exceptions import CEUnavailableError
from gubbins.domain.pilot_states import CANCELLED_FOR, CANCELLED_OVERDUE, MyPilotStatus
from gubbins.domain.rules import CERules, rules_of

from .ce_calls import backend_of, describe_failure
from .circuits import acquire_call, record_call_failure, record_call_success
from .outputs import statuses_with_output
from .response_validation import check_observations

logger = logging.getLogger(__name__)

PROMPT_SECONDS = 2
"""Interval at which responses are recorded, and time limit of the cleanup after the last response."""

CYCLE_SECONDS = 30
"""Interval at which compute elements are polled again while a slower one delays the end of the check."""

_ENDS = {Observed.DONE: MyPilotStatus.DONE, Observed.FAILED: MyPilotStatus.FAILED}


@dataclass(frozen=True)
class PollRequest:
    """A poll of one compute element about pilots of a VO."""

    ce: Mapping[str, Any]
    vo: str
    pilots: Sequence[ActivePilot]

    @cached_property
    def statuses_with_output(self) -> frozenset[MyPilotStatus]:
        """As the function, computed once: very many pilots may end in one check."""
        return statuses_with_output(self.ce)

    def at_ce(self, pilot: ActivePilot) -> PilotAtCE:
        """Convert a pilot of the database to the pilot of a call."""
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
    """Changes that a check records in one transaction, for all compute elements that have responded."""

    moves: dict[MyPilotStatus, list[tuple[int, str | None]]] = field(default_factory=lambda: defaultdict(list))
    confirmed: list[tuple[int, str]] = field(default_factory=list)
    gone_missing: list[int] = field(default_factory=list)
    found_again: list[int] = field(default_factory=list)
    never_submitted: list[int] = field(default_factory=list)
    ended: dict[str, list[PilotAtCE]] = field(default_factory=lambda: defaultdict(list))  # by compute element
    outputs: list[int] = field(default_factory=list)  # pilots whose output is to be fetched
    never_seen: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # changes of `never_seen`
    waiting: list[tuple[int, str | None]] = field(default_factory=list)  # new waiting reasons
    overdue: list[tuple[int, str | None]] = field(default_factory=list)  # to be cancelled, with the reason

    def end(self, request: PollRequest, pilot: ActivePilot, status: MyPilotStatus, reason: str | None) -> None:
        """Record the end of a pilot."""
        if status is MyPilotStatus.FAILED and (pilot.last_error or "").startswith(CANCELLED_FOR):
            reason = pilot.last_error
        self.moves[status].append((pilot.pilot_id, reason))
        if status in request.statuses_with_output:
            self.outputs.append(pilot.pilot_id)  # cleaned up after its output is stored
        else:
            self.ended[request.ce["name"]].append(request.at_ce(pilot)._replace(status=status))


PollResult: TypeAlias = tuple[Mapping[str, Observation], str | None]
"""Observations, and errors beside the poll, which succeeded."""
_Polls: TypeAlias = dict[asyncio.Task[PollResult], PollRequest]


async def transition_pilot_states(
    db: MyPilotDB, vo: str, *, prompt_seconds: float = PROMPT_SECONDS, cycle_seconds: float = CYCLE_SECONDS
) -> dict[MyPilotStatus, int]:
    """Poll the compute elements, update the states of the VO's pilots, and return how many entered each state.

    Compute elements are polled concurrently, outside transactions; a slow one does not delay the others, which are
    polled again in each cycle. Responses are recorded by a constant number of statements.

    In each cycle a pilot makes at most one step: one that has already ended when it is first seen becomes RUNNING,
    and ends in the next cycle. If a compute element does not respond, its error is recorded and its pilots do not
    change. Banned and paused compute elements are not polled.
    """
    counts: Counter[MyPilotStatus] = Counter()
    polls = await _start_polls(db, vo, ())
    first = frozenset(polls)  # the check ends with these; repeated polls do not prolong it
    again_at = time.monotonic() + cycle_seconds
    cleanups: list[asyncio.Task[None]] = []
    try:
        while polls:
            done, _ = await asyncio.wait(polls, timeout=prompt_seconds)
            if done:
                requests = {task: polls.pop(task) for task in done}
                changes, entered = await _record(db, vo, requests)
                counts.update(entered)
                ces = {request.ce["name"]: request.ce for request in requests.values()}
                cleanups += [asyncio.create_task(_cleanup(ces[name], e)) for name, e in changes.ended.items()]
            if time.monotonic() >= again_at and not first.isdisjoint(polls):
                polls |= await _start_polls(db, vo, [request.ce["name"] for request in polls.values()])
                again_at = time.monotonic() + cycle_seconds
        if cleanups:
            await asyncio.wait(cleanups, timeout=prompt_seconds)
    finally:
        for task in (*polls, *cleanups):
            task.cancel()
        await asyncio.gather(*polls, *cleanups, return_exceptions=True)
    return dict(counts)


async def _start_polls(db: MyPilotDB, vo: str, all_but: Collection[str]) -> _Polls:
    """Start polls of the compute elements with active pilots of the VO, except `all_but`."""
    by_ce: dict[str, list[ActivePilot]] = defaultdict(list)
    for pilot in await db.get_active_pilots(vo=vo):
        if pilot.ce_name not in all_but:
            by_ce[pilot.ce_name].append(pilot)
    if not by_ce:
        return {}
    requests = [
        PollRequest(ce, vo, by_ce[ce["name"]])
        for ce in await db.list_ces(vo=vo, serving=False)
        if ce["name"] in by_ce and await acquire_call(db, ce, CECall.STATUS)
    ]
    return {asyncio.create_task(_poll(request)): request for request in requests}


@contextlib.contextmanager
def _gc_disabled() -> Iterator[None]:
    """Disable garbage collection while very many live objects are created; nothing may be awaited inside."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


async def _poll(request: PollRequest) -> PollResult:
    ce = request.ce
    with _gc_disabled():
        pilots = [request.at_ce(pilot) for pilot in request.pilots]
    seconds = rules_of(ce).timeout_seconds
    async with backend_of(ce, request.vo) as backend:
        # Repeated until the pilot has ended, for an earlier request may have been lost.
        if to_cancel := [pilot for pilot in pilots if pilot.cancel_requested]:
            try:
                async with asyncio.timeout(seconds):
                    await backend.cancel(to_cancel)
            except Exception as error:
                backend.warn(f"cannot cancel {len(to_cancel)} pilots: {describe_failure(ce, error)}")
        async with asyncio.timeout(seconds):
            response = await backend.poll(pilots)
        checked = check_observations(ce, response, (pilot.stamp for pilot in pilots))
        return checked, backend.warning


async def _record(db: MyPilotDB, vo: str, polls: _Polls) -> tuple[StatusChanges, dict[MyPilotStatus, int]]:
    """Record the results of finished polls in one transaction.

    Returns:
        The changes, and the number of pilots that entered each state.
    """
    changes = StatusChanges()
    failures: dict[str, tuple[str, Exception]] = {}
    warnings: dict[str, str | None] = {}
    ces = {request.ce["name"]: request.ce for request in polls.values()}
    now = clock.now()
    for task, request in polls.items():
        name = request.ce["name"]
        error = CEUnavailableError("its back end was cancelled") if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            failures[name] = describe_failure(request.ce, error), error
            logger.warning("Cannot check the pilots of %s at %s: %s", vo, name, failures[name][0])
        elif error is not None:
            raise error
        else:
            observations, warnings[name] = task.result()
            with _gc_disabled():
                _evaluate(request, observations, now, changes)

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
            number = math.floor(changes.never_seen[name])
            if number > 0 or (number and ces[name]["never_seen"]):
                await db.count_never_seen(name, number)
        for name in sorted({*failures, *warnings}):
            if name in failures:
                await record_call_failure(db, ces[name], CECall.STATUS, *failures[name])
                continue
            await record_call_success(db, ces[name], CECall.STATUS)
            if (warning := warnings[name]) is not None:
                await db.record_ce_error(name, warning)
        return entered, released

    entered, released = await db.run(write)
    if released:
        logger.warning("Released slots of unconfirmed submissions of %s: %s", vo, changes.never_submitted)
    return changes, entered


def _evaluate(
    request: PollRequest, observations: Mapping[str, Observation], now: datetime, changes: StatusChanges
) -> None:
    rules = rules_of(request.ce)
    has_limits = bool(rules.max_waiting_hours or rules.max_running_hours)
    for pilot in request.pilots:
        seen = observations.get(pilot.stamp)
        if seen is None:
            _evaluate_unknown(request, pilot, now, rules, changes)
            continue
        check_limits = has_limits and pilot.cancel_requested_at is None
        if check_limits and (reason := _overdue(pilot, seen, rules, now)) is not None:
            changes.overdue.append((pilot.pilot_id, reason))
        if seen.state is Observed.NO_NEWS:
            continue
        if pilot.missing_since is not None:
            changes.found_again.append(pilot.pilot_id)
            changes.never_seen[request.ce["name"]] -= _never_seen(pilot, pilot.missing_since)
        if pilot.reference is None and seen.reference is not None:
            changes.confirmed.append((pilot.pilot_id, seen.reference))
        waiting_reason = seen.reason if seen.state is Observed.WAITING else None
        if pilot.status is MyPilotStatus.SUBMITTED and seen.state is not Observed.WAITING:
            changes.moves[MyPilotStatus.RUNNING].append((pilot.pilot_id, None))
        elif (end := _ENDS.get(seen.state)) is not None:
            changes.never_seen[request.ce["name"]] -= rules.max_missing_share
            changes.end(request, pilot, end, seen.reason)
        elif waiting_reason != pilot.waiting_reason:  # also of a running one: it is held, or requeued
            changes.waiting.append((pilot.pilot_id, waiting_reason))


def _never_seen(pilot: ActivePilot, missing_since: datetime) -> bool:
    """True if the compute element had not listed the pilot before, or hardly: its own report may come first."""
    if pilot.started_at is None or pilot.started_at > missing_since:
        return True
    return missing_since - pilot.submitted_at < timedelta(seconds=2 * CYCLE_SECONDS)


def _overdue(pilot: ActivePilot, seen: Observation, rules: CERules, now: datetime) -> str | None:
    """Describe why a pilot has waited or run for longer than the rules allow; None: it has not."""
    if seen.state in _ENDS:
        return None
    if pilot.started_at is not None:  # may be held or requeued meanwhile, or without news
        verb, since, hours = "ran", pilot.started_at, rules.max_running_hours
    elif seen.state is Observed.WAITING:
        verb, since, hours = "waited", pilot.submitted_at, rules.max_waiting_hours
    else:
        return None
    if hours is None or now - since <= timedelta(hours=hours):
        return None
    return f"{CANCELLED_OVERDUE}{verb} longer than {hours:g} h{f' ({seen.reason})' if seen.reason else ''}"


def _evaluate_unknown(
    request: PollRequest, pilot: ActivePilot, now: datetime, rules: CERules, changes: StatusChanges
) -> None:
    """Handle a pilot that the compute element does not know: missing first, FAILED after `lost_seconds`."""
    if pilot.status is MyPilotStatus.SUBMITTED and pilot.reference is None:
        if now - pilot.submitted_at > timedelta(seconds=rules.unconfirmed_seconds):
            changes.never_submitted.append(pilot.pilot_id)
    elif pilot.missing_since is None:
        changes.gone_missing.append(pilot.pilot_id)
        changes.never_seen[request.ce["name"]] += _never_seen(pilot, now)
    elif now - pilot.missing_since > timedelta(seconds=rules.lost_seconds):
        if pilot.status is MyPilotStatus.SUBMITTED:
            # FAILED is entered from RUNNING only: the next check does that.
            changes.moves[MyPilotStatus.RUNNING].append((pilot.pilot_id, "unknown to its compute element"))
        else:
            reason = f"unknown to its compute element since {pilot.missing_since:%Y-%m-%d %H:%M:%S} UTC"
            changes.end(request, pilot, MyPilotStatus.FAILED, reason)


async def _cleanup(ce: Mapping[str, Any], ended: Sequence[PilotAtCE]) -> None:
    """Clean up after ended pilots; errors are only logged."""
    try:
        async with backend_of(ce, ended[0].vo) as backend, asyncio.timeout(rules_of(ce).timeout_seconds):
            await backend.cleanup(ended)
    except Exception as error:
        logger.warning("Cannot clean up after pilots at %s: %s", ce["name"], describe_failure(ce, error))
