"""Which compute elements may be spoken to now, and what is noted when that goes wrong."""

from __future__ import annotations

__all__ = ["Obstacle", "may_call", "may_submit", "note_failure", "note_success", "on_trial", "why_no_pilots"]

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NamedTuple

from gubbins.db.sql import MyPilotDB
from gubbins.domain import clock
from gubbins.domain.circuit_breaker import CECall, CircuitState
from gubbins.domain.rules import rules_of, what_is_wrong_with_rules

#: A probe that was not heard of for this many time-outs died with its worker.
_PROBE_TIMEOUTS = 3


class Obstacle(NamedTuple):
    """Why a compute element gets no pilots."""

    why: str
    said: str  # what the site said, or what is wrong with the rules: for administrators


async def why_no_pilots(db: MyPilotDB, ce: Mapping[str, Any]) -> Obstacle | None:
    """Why this compute element gets no pilots, as its rules and its circuits stand; None: it does.

    One whose status could not be read gets none, from the first failure on: nobody knows how full it is. But
    nobody asks one that has no pilots either: after a pause, one pilot gives the checks something to ask for.
    """
    if (problem := what_is_wrong_with_rules(ce)) is not None:
        return Obstacle("its rules in the database are wrong, `gubbins ce load` mends them", problem)
    status, submit = ce["circuits"][CECall.STATUS], ce["circuits"][CECall.SUBMIT]
    if status["failures"] and (_pauses(ce) or await db.holds_pilots(ce["name"])):
        return Obstacle("its status cannot be read", status["last_error"])
    if submit["state"] is CircuitState.OPEN:
        until = f"{submit['open_until']:%H:%M:%S} UTC"
        return Obstacle(
            f"{submit['failures']} submissions in a row failed, no more until {until}", submit["last_error"]
        )
    return None


def _pauses(ce: Mapping[str, Any]) -> bool:
    """Whether the last failure to read its status is too recent for another try."""
    status = ce["circuits"][CECall.STATUS]
    pause = timedelta(seconds=rules_of(ce).breaker_pause_seconds)
    return bool(clock.now() < (status["open_until"] or status["last_error_at"] + pause))


def on_trial(ce: Mapping[str, Any]) -> bool:
    """Whether this compute element, if it gets pilots at all, gets one that finds out how it is."""
    status, submit = ce["circuits"][CECall.STATUS], ce["circuits"][CECall.SUBMIT]
    return bool(status["failures"]) or submit["state"] is CircuitState.HALF_OPEN


async def may_submit(db: MyPilotDB, ce: Mapping[str, Any]) -> bool:
    """Whether a pilot may be submitted now. For the transaction that reserves its slot: it locks the row.

    Where the status could not be read, the pilot has to be the only one.
    """
    if ce["circuits"][CECall.STATUS]["failures"] and await db.holds_pilots(ce["name"], lock=True):
        return False
    return await may_call(db, ce, CECall.SUBMIT)


async def may_call(db: MyPilotDB, ce: Mapping[str, Any], call: CECall) -> bool:
    """Whether such a call may be made now; of a half-open circuit, it is then the one that finds out."""
    circuit = ce["circuits"][call]
    if ce["banned_at"] is not None or circuit["state"] is CircuitState.OPEN:
        return False
    if circuit["state"] is CircuitState.CLOSED:
        return True
    probe_seconds = rules_of(ce).timeout_seconds * _PROBE_TIMEOUTS
    return await db.enter_circuit(ce["name"], call, probe_seconds=probe_seconds)


async def note_failure(db: MyPilotDB, ce: Mapping[str, Any], call: CECall, message: str) -> None:
    """A call did not work."""
    await db.record_failure(ce["name"], call, message, **rules_of(ce).breaker)


async def note_success(db: MyPilotDB, ce: Mapping[str, Any], call: CECall) -> None:
    """A call worked. Writes only where there was trouble when `ce` was read."""
    others = [circuit for name, circuit in ce["circuits"].items() if name != call]
    complained = ce["last_error"] is not None and not any(circuit["failures"] for circuit in others)
    if ce["circuits"][call]["failures"] or complained:
        await db.record_success(ce["name"], call)
