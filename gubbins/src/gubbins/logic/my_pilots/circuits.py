"""Use of the circuit breakers: permission for calls to a compute element, and records of their results."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from shlex import quote
from typing import Any

from gubbins.db.sql import MyPilotDB
from gubbins.domain import clock
from gubbins.domain.circuit_breaker import CECall, CircuitState
from gubbins.domain.exceptions import CEPausedError, CEUnavailableError
from gubbins.domain.rules import rules_error, rules_of

#: A probe without a result expires after this many time-outs.
_PROBE_TIMEOUTS = 3


def submission_blocker(ce: Mapping[str, Any]) -> CEPausedError | None:
    """Find the reason why this compute element gets no pilots: rules, downtime, quota or circuits; None: none.

    After the first failed poll there are no submissions, for the load is not known. A compute element without
    pilots is not polled: after a pause it gets one pilot, for the checks to poll.
    """
    name, downtime, blocker = ce["name"], ce["downtime"], None
    status, submit = ce["circuits"][CECall.STATUS], ce["circuits"][CECall.SUBMIT]
    if (problem := rules_error(ce)) is not None:
        why = "its rules in the database are wrong, `gubbins ce load` corrects them"
        blocker = CEPausedError(name, why, problem)
    elif downtime is not None:
        blocker = downtime.blocker(clock.now())
    elif (limit := quota_limit(ce)) is not None and ce["polled"] >= limit:
        blocker = CEPausedError(name, f"quota of the site: {ce['quota']}")
    elif (missing := missing_pilots(ce)) is not None:
        blocker = CEPausedError(name, missing)
    elif status["failures"] and (_is_backing_off(ce) or ce["polled"]):
        blocker = CEPausedError(name, "its status cannot be read", status["last_error"])
    elif submit["state"] is CircuitState.OPEN:
        until = f"{submit['open_until']:%H:%M:%S} UTC"
        failed = f"{number} submissions in a row" if (number := submit["failures"]) > 1 else "the last submission"
        blocker = CEPausedError(name, f"{failed} failed, no more until {until}", submit["last_error"])
    return blocker


def quota_limit(ce: Mapping[str, Any]) -> int | None:
    """Compute the limit of pilots from the last quota refusal of the site; None: only the capacity limits them.

    The limit is 0 for `breaker_pause_seconds` after the refusal, then the quota plus a tenth of it for each such
    period without another refusal.
    """
    if ce["quota"] is None:
        return None
    steps = (clock.now() - ce["quota_at"]) // timedelta(seconds=rules_of(ce).breaker_pause_seconds)
    limit = int(ce["quota"]) + steps * max(1, ce["quota"] // 10) if steps > 0 else 0
    return limit if limit < ce["capacity"] else None


def missing_pilots(ce: Mapping[str, Any]) -> str | None:
    """Describe why missing pilots stop submissions; None: they do not.

    Else a site that responds but does not list our pilots would get replacements for lost pilots endlessly.
    """
    rules, missing, active, never_seen = rules_of(ce), ce["missing"], ce["active"], ce["never_seen"] or 0
    known = active - missing
    if never_seen >= rules.max_missing and never_seen >= rules.max_missing_share * (known + never_seen):
        return (
            f"it has accepted {never_seen} pilots that it does not list, and lists {known}: "
            f"when that is corrected, `gubbins ce enable {quote(ce['name'])}`"
        )
    if missing >= rules.max_missing and missing >= rules.max_missing_share * active:
        return f"{missing} of its {active} pilots are missing: it responds, and does not list them"
    return None


def _is_backing_off(ce: Mapping[str, Any]) -> bool:
    """True if the last status call failed less than a pause ago."""
    status = ce["circuits"][CECall.STATUS]
    pause = timedelta(seconds=rules_of(ce).breaker_pause_seconds)
    return bool(clock.now() < (status["open_until"] or status["last_error_at"] + pause))


def half_open(ce: Mapping[str, Any]) -> bool:
    """True if the next submission is a probe: a single pilot."""
    status, submit = ce["circuits"][CECall.STATUS], ce["circuits"][CECall.SUBMIT]
    return bool(status["failures"]) or submit["state"] is CircuitState.HALF_OPEN


def is_reachable(ce: Mapping[str, Any]) -> bool:
    """True for calls that only need a closed circuit: the probe of a half-open one is left to a check."""
    return ce["banned_at"] is None and ce["circuits"][CECall.STATUS]["state"] is CircuitState.CLOSED


async def acquire_submission(db: MyPilotDB, ce: Mapping[str, Any]) -> bool:
    """Acquire permission for a submission, in the transaction that reserves its slot.

    After a failed poll it is granted only to a compute element without pilots.
    """
    if ce["circuits"][CECall.STATUS]["failures"]:
        await db.lock_ces([ce["name"]])
        if await db.count_active(ce["name"], ce["circuits_of"] or None):
            return False
    return await acquire_call(db, ce, CECall.SUBMIT)


async def acquire_call(db: MyPilotDB, ce: Mapping[str, Any], call: CECall) -> bool:
    """Acquire permission for a call; of a half-open circuit, for its probe."""
    circuit = ce["circuits"][call]
    if ce["banned_at"] is not None or circuit["state"] is CircuitState.OPEN:
        return False
    if circuit["state"] is CircuitState.CLOSED:
        return True
    probe_seconds = rules_of(ce).timeout_seconds * _PROBE_TIMEOUTS
    return await db.enter_circuit(ce["name"], call, probe_seconds=probe_seconds, vo=ce["circuits_of"])


async def record_call_failure(
    db: MyPilotDB, ce: Mapping[str, Any], call: CECall, message: str, error: Exception | None = None
) -> None:
    """Record a failed call; an error of a site that requests a pause opens the circuit at once."""
    seconds = error.requested_pause_seconds if isinstance(error, CEUnavailableError) else 0
    breaker = {**rules_of(ce).breaker, "requested_pause_seconds": seconds, "vo": ce["circuits_of"]}
    await db.record_failure(ce["name"], call, message, **breaker)


async def record_call_success(db: MyPilotDB, ce: Mapping[str, Any], call: CECall) -> None:
    """Record a successful call; writes only if `ce` has failures or an error to clear."""
    others = [circuit for name, circuit in ce["circuits"].items() if name != call]
    stale_error = ce["last_error"] is not None and not any(circuit["failures"] for circuit in others)
    if ce["circuits"][call]["failures"] or stale_error:
        await db.record_success(ce["name"], call, vo=ce["circuits_of"])
