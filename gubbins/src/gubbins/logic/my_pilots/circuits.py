"""Which compute elements may be spoken to now, and what is noted when that goes wrong."""

from __future__ import annotations

__all__ = ["may_call", "note_failure", "note_success", "why_no_pilots"]

from collections.abc import Mapping
from typing import Any

from gubbins.circuits import CECall, CircuitState
from gubbins.db.sql import MyPilotDB

from .rules import rules_of

#: A probe that was not heard of for this many time-outs died with its worker.
_PROBE_TIMEOUTS = 3


def why_no_pilots(ce: Mapping[str, Any]) -> str | None:
    """Why this compute element gets no pilots, as its circuits stand; None: it does.

    One whose status could not be read gets none, from the first failure on: nobody knows how full it is.
    """
    status, submit = ce["circuits"][CECall.STATUS], ce["circuits"][CECall.SUBMIT]
    if status["failures"]:
        return f"its status cannot be read ({status['last_error']})"
    if submit["state"] is CircuitState.OPEN:
        return (
            f"{submit['failures']} submissions in a row failed, no more until "
            f"{submit['open_until']:%H:%M:%S} UTC ({submit['last_error']})"
        )
    return None


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
