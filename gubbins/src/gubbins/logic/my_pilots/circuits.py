"""Circuit breakers in use: which calls may be made, and how their results are recorded."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NamedTuple

from gubbins.db.sql import MyPilotDB
from gubbins.domain import clock
from gubbins.domain.circuit_breaker import CECall, CircuitState
from gubbins.domain.rules import rules_error, rules_of

#: After this many time-outs without a result, a probe is taken for dead.
_PROBE_TIMEOUTS = 3


class Blocker(NamedTuple):
    """Reason why a compute element gets no pilots."""

    why: str
    said: str  # error of the site, or in the rules: for administrators
    way_out: str = ""  # for administrators; none: it is opened


async def submission_blocker(db: MyPilotDB, ce: Mapping[str, Any]) -> Blocker | None:
    """Find the reason why this compute element gets no pilots: rules or circuits; None: it does.

    One whose status could not be read gets none, from the first failure on: its load is not known. But one
    without pilots is not polled: after a pause, one pilot gives the checks something to poll.
    """
    if (blocker := _planned(ce)) is not None:
        return blocker
    limit = quota_limit(ce)
    active = await db.count_active(ce["name"]) if ce["missing"] or limit is not None else 0
    if limit is not None and active >= limit:
        return Blocker(f"quota of the site: {ce['quota']}", "")
    if (missing := missing_pilots(ce, active)) is not None:
        return Blocker(missing, "")
    status, submit = ce["circuits"][CECall.STATUS], ce["circuits"][CECall.SUBMIT]
    if status["failures"] and (_pauses(ce) or await db.holds_pilots(ce["name"])):
        return Blocker("its status cannot be read", status["last_error"])
    if submit["state"] is CircuitState.OPEN:
        until = f"{submit['open_until']:%H:%M:%S} UTC"
        return Blocker(
            f"{submit['failures']} submissions in a row failed, no more until {until}", submit["last_error"]
        )
    return None


def _planned(ce: Mapping[str, Any]) -> Blocker | None:
    if (problem := rules_error(ce)) is not None:
        return Blocker("its rules in the database are wrong, `gubbins ce load` mends them", problem)
    if (downtime := ce["downtime"]) is None:
        return None
    return Blocker(downtime.describe(clock.now()), "", f"`gubbins ce downtime remove {downtime.id}` ends it")


def quota_limit(ce: Mapping[str, Any]) -> int | None:
    """Number of pilots that the compute element may have, by the quota of the site; None: by its capacity.

    None are added for a moment (`breaker_pause_seconds`); then a tenth of the quota each time that moment passes
    without another refusal, beside what pilots that end leave free.
    """
    if ce["quota"] is None:
        return None
    steps = (clock.now() - ce["quota_at"]) // timedelta(seconds=rules_of(ce).breaker_pause_seconds)
    limit = int(ce["quota"]) + steps * max(1, ce["quota"] // 10) if steps > 0 else 0
    return limit if limit < ce["capacity"] else None


def missing_pilots(ce: Mapping[str, Any], active: int) -> str | None:
    """Say that so many confirmed pilots are missing that submissions stop; None: they go on.

    A site that answers and does not list our pilots would get new ones in place of those taken for lost, for ever.
    """
    rules = rules_of(ce)
    if (ce["missing_in_row"] or 0) >= rules.max_missing:
        return (
            f"it has accepted {ce['missing_in_row']} pilots in a row that it does not list, "
            f"and none that was seen: when that is mended, `gubbins ce enable {ce['name']}`"
        )
    if ce["missing"] >= rules.max_missing and ce["missing"] > rules.max_missing_share * active:
        return f"{ce['missing']} of its {active} pilots are missing: it answers, and does not list them"
    return None


def _pauses(ce: Mapping[str, Any]) -> bool:
    """True if the last failed status call is too recent for another try."""
    status = ce["circuits"][CECall.STATUS]
    pause = timedelta(seconds=rules_of(ce).breaker_pause_seconds)
    return bool(clock.now() < (status["open_until"] or status["last_error_at"] + pause))


def half_open(ce: Mapping[str, Any]) -> bool:
    """True if this compute element gets a single pilot, as a probe."""
    status, submit = ce["circuits"][CECall.STATUS], ce["circuits"][CECall.SUBMIT]
    return bool(status["failures"]) or submit["state"] is CircuitState.HALF_OPEN


async def may_submit(db: MyPilotDB, ce: Mapping[str, Any]) -> bool:
    """Acquire the right to submit a pilot now, in the transaction that reserves its slot: it locks the row.

    Where the status could not be read, the pilot has to be the only one.
    """
    if ce["circuits"][CECall.STATUS]["failures"] and await db.holds_pilots(ce["name"], lock=True):
        return False
    return await may_call(db, ce, CECall.SUBMIT)


async def may_call(db: MyPilotDB, ce: Mapping[str, Any], call: CECall) -> bool:
    """Acquire the right to make such a call now; of a half-open circuit, as its probe."""
    circuit = ce["circuits"][call]
    if ce["banned_at"] is not None or circuit["state"] is CircuitState.OPEN:
        return False
    if circuit["state"] is CircuitState.CLOSED:
        return True
    probe_seconds = rules_of(ce).timeout_seconds * _PROBE_TIMEOUTS
    return await db.enter_circuit(ce["name"], call, probe_seconds=probe_seconds)


async def note_failure(db: MyPilotDB, ce: Mapping[str, Any], call: CECall, message: str) -> None:
    """Record a failed call."""
    await db.record_failure(ce["name"], call, message, **rules_of(ce).breaker)


async def note_success(db: MyPilotDB, ce: Mapping[str, Any], call: CECall) -> None:
    """Record a successful call; writes only where there were failures when `ce` was read."""
    others = [circuit for name, circuit in ce["circuits"].items() if name != call]
    complained = ce["last_error"] is not None and not any(circuit["failures"] for circuit in others)
    if ce["circuits"][call]["failures"] or complained:
        await db.record_success(ce["name"], call)
