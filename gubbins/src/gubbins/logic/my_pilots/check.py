"""Follow the pilots of one VO: ask their compute elements, and move each at most one step (P61)."""

from __future__ import annotations

__all__ = ["transition_pilot_states"]

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
from gubbins.domain.pilot_states import MyPilotStatus
from gubbins.domain.rules import CERules, rules_of

from .ce_calls import backend_of, describe_failure
from .circuits import may_call, note_failure, note_success
from .outputs import ends_with_output
from .response_validation import check_observations

logger = logging.getLogger(__name__)

PROMPT_SECONDS = 2
"""What has been answered by then is written down, without waiting for slower compute elements.

Tidying up at compute elements is given so much time after the last answer, and no more.
"""

CYCLE_SECONDS = 30
"""Compute elements that have answered are asked again after that, while others keep the check from ending."""

_ENDS = {Observed.DONE: MyPilotStatus.DONE, Observed.FAILED: MyPilotStatus.FAILED}


@dataclass(frozen=True)
class _Answer:
    """What one compute element said."""

    observations: Mapping[str, Observation]
    complaint: str | None  # about the cancellations, which did not keep it from answering


@dataclass(frozen=True)
class _Question:
    """One compute element, and the pilots of a VO that it is asked about."""

    ce: Mapping[str, Any]
    vo: str
    pilots: Sequence[Any]

    @cached_property
    def ends_with_output(self) -> frozenset[MyPilotStatus]:
        """The ends at which output is to be fetched: found out once, for many may end at a time."""
        return ends_with_output(self.ce)

    def described(self, pilot: Any) -> PilotAtCE:
        """One of them, as the compute element is told of it."""
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
class _Findings:
    """What a check will write down, for all compute elements that have answered."""

    moves: dict[MyPilotStatus, list[tuple[int, str | None]]] = field(default_factory=lambda: defaultdict(list))
    confirmed: list[tuple[int, str]] = field(default_factory=list)
    gone_missing: list[int] = field(default_factory=list)
    found_again: list[int] = field(default_factory=list)
    never_submitted: list[int] = field(default_factory=list)
    ended: dict[str, list[PilotAtCE]] = field(default_factory=lambda: defaultdict(list))  # by compute element
    outputs: list[int] = field(default_factory=list)

    def end(self, question: _Question, pilot: Any, status: MyPilotStatus, reason: str | None) -> None:
        """The pilot has ended so."""
        self.moves[status].append((pilot.pilot_id, reason))
        if status in question.ends_with_output:
            self.outputs.append(pilot.pilot_id)  # the CE may forget it when that is stored
        else:
            self.ended[question.ce["name"]].append(question.described(pilot)._replace(status=status))


_Asked: TypeAlias = dict[asyncio.Task[_Answer], _Question]


async def transition_pilot_states(db: MyPilotDB, vo: str) -> dict[MyPilotStatus, int]:
    """Move the VO's pilots on, and return how many entered each state.

    A handful of statements, whatever the number of pilots (P62), and no transaction while compute elements
    are being asked: all of them at once, and a slow one does not keep back what the others have said. While
    it lasts for longer than a cycle, the others are asked again, as if it were not there.

    In each cycle a pilot makes one step towards what its compute element says: one that has already ended
    when it is first seen is RUNNING then, and at its end in the next. A compute element that cannot be asked
    keeps its pilots as they are, and the complaint. One that is banned, or left in peace because it failed
    too often, is not asked.
    """
    counts: Counter[MyPilotStatus] = Counter()
    asked = await _ask_all(db, vo, ())
    first = frozenset(
        asked
    )  # this lasts as long as they do; those that are asked again do not prolong it for ever
    again_at = time.monotonic() + CYCLE_SECONDS
    tidying: list[asyncio.Task[None]] = []
    try:
        while asked:
            answered, _ = await asyncio.wait(asked, timeout=PROMPT_SECONDS)
            if answered:
                questions = {task: asked.pop(task) for task in answered}
                findings, entered = await _note(db, vo, questions)
                counts.update(entered)
                ces = {question.ce["name"]: question.ce for question in questions.values()}
                tidying += [asyncio.create_task(_forget(ces[name], e)) for name, e in findings.ended.items()]
            if time.monotonic() >= again_at and not first.isdisjoint(asked):
                asked |= await _ask_all(db, vo, [question.ce["name"] for question in asked.values()])
                again_at = time.monotonic() + CYCLE_SECONDS
        if tidying:
            await asyncio.wait(tidying, timeout=PROMPT_SECONDS)
    finally:
        for task in (*asked, *tidying):
            task.cancel()
        await asyncio.gather(*asked, *tidying, return_exceptions=True)
    return dict(counts)


async def _ask_all(db: MyPilotDB, vo: str, all_but: Collection[str]) -> _Asked:
    """Begin to ask the compute elements that have pilots of the VO, except those of these names."""
    by_ce: dict[str, list[Any]] = defaultdict(list)
    for pilot in await db.get_active_pilots(vo=vo):
        if pilot.ce_name not in all_but:
            by_ce[pilot.ce_name].append(pilot)
    if not by_ce:
        return {}
    questions = [
        _Question(ce, vo, by_ce[ce["name"]])
        for ce in await db.get_ces()
        if ce["name"] in by_ce and await may_call(db, ce, CECall.STATUS)
    ]
    return {asyncio.create_task(_ask(question)): question for question in questions}


async def _ask(question: _Question) -> _Answer:
    ce = question.ce
    described = [question.described(pilot) for pilot in question.pilots]
    seconds = rules_of(ce).timeout_seconds
    complaint = None
    async with backend_of(ce) as backend:
        # A cancellation is asked for again until the pilot has ended: the first request may have been lost.
        if to_cancel := [pilot for pilot in described if pilot.cancel_requested]:
            try:
                async with asyncio.timeout(seconds):
                    await backend.cancel(to_cancel)
            except Exception as error:
                complaint = f"cannot cancel {len(to_cancel)} pilots: {describe_failure(ce, error)}"
        async with asyncio.timeout(seconds):
            answer = await backend.poll(described)
        return _Answer(check_observations(ce, answer, (pilot.stamp for pilot in described)), complaint)


async def _note(db: MyPilotDB, vo: str, answered: _Asked) -> tuple[_Findings, dict[MyPilotStatus, int]]:
    """Write down, in one transaction, what these compute elements have answered.

    Returns:
        That, and how many pilots entered each state.
    """
    findings = _Findings()
    failures: dict[str, str] = {}
    complaints: dict[str, str | None] = {}
    ces = {question.ce["name"]: question.ce for question in answered.values()}
    now = clock.now()
    for task, question in answered.items():
        name = question.ce["name"]
        # Nobody else has cancelled it.
        error = CEUnavailableError("its back end broke off") if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            failures[name] = describe_failure(question.ce, error)
            logger.warning("Cannot check the pilots of %s at %s: %s", vo, name, failures[name])
        elif error is not None:
            raise error
        else:
            answer = task.result()
            complaints[name] = answer.complaint
            _judge(question, answer.observations, now, findings)

    async def write() -> tuple[dict[MyPilotStatus, int], int]:
        await db.lock_ces(ces)
        entered = await db.advance_pilots(findings.moves, vo=vo)
        await db.queue_outputs(findings.outputs)
        await db.confirm_pilots(findings.confirmed)
        await db.set_pilots_missing(findings.gone_missing, now)
        await db.set_pilots_missing(findings.found_again, None)
        released = await db.release_pilots(findings.never_submitted)
        for name in sorted({*failures, *complaints}):
            if name in failures:
                await note_failure(db, ces[name], CECall.STATUS, failures[name])
                continue
            # Whoever answers polls is well, although not all may be cancelled there.
            await note_success(db, ces[name], CECall.STATUS)
            if (complaint := complaints[name]) is not None:
                await db.record_ce_error(name, complaint)
        return entered, released

    entered, released = await db.run(write)
    if released:
        logger.warning("Undid submissions of %s that were never confirmed: %s", vo, findings.never_submitted)
    return findings, entered


def _judge(
    question: _Question, observations: Mapping[str, Observation], now: datetime, findings: _Findings
) -> None:
    rules = rules_of(question.ce)
    for pilot in question.pilots:
        seen = observations.get(pilot.stamp)
        if seen is None:
            _judge_unknown(question, pilot, now, rules, findings)
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
            findings.end(question, pilot, end, seen.reason)


def _judge_unknown(question: _Question, pilot: Any, now: datetime, rules: CERules, findings: _Findings) -> None:
    """The compute element does not know the pilot: that is not an end, but it cannot go on for ever."""
    if pilot.status is MyPilotStatus.SUBMITTED and pilot.reference is None:
        if now - pilot.submitted_at > timedelta(seconds=rules.unconfirmed_seconds):
            findings.never_submitted.append(pilot.pilot_id)
    elif pilot.missing_since is None:
        findings.gone_missing.append(pilot.pilot_id)
    elif now - pilot.missing_since > timedelta(seconds=rules.lost_seconds):
        if pilot.status is MyPilotStatus.SUBMITTED:
            # The only way to an end leads through RUNNING: it stays missing there, and the next check ends it.
            findings.moves[MyPilotStatus.RUNNING].append((pilot.pilot_id, "unknown to its compute element"))
        else:
            reason = f"unknown to its compute element since {pilot.missing_since:%Y-%m-%d %H:%M:%S} UTC"
            findings.end(question, pilot, MyPilotStatus.FAILED, reason)


async def _forget(ce: Mapping[str, Any], ended: Sequence[PilotAtCE]) -> None:
    """Tidying up only: what fails here is not worth failing a check that is already recorded."""
    try:
        async with backend_of(ce) as backend, asyncio.timeout(rules_of(ce).timeout_seconds):
            await backend.cleanup(ended)
    except Exception as error:
        logger.warning("Cannot tidy up after pilots at %s: %s", ce["name"], describe_failure(ce, error))
