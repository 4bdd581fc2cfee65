"""Health checks of compute elements (entry point `diracx.tasks_health`)."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from shlex import quote
from typing import Any

from diracx.tasks.operations.health import Alert, Severity
from diracx.tasks.operations.health.alerts import counted

from gubbins.db import URL_VARIABLE
from gubbins.domain import clock
from gubbins.domain.circuit_breaker import CECall, CircuitState
from gubbins.domain.pilot_states import MyPilotStatus

#: Minimum number of pilots that ended within the past hour for an alert.
_MIN_ENDED = 4
_WARNING_SHARE = 0.5
_CRITICAL_SHARE = 0.9


@asynccontextmanager
async def source() -> AsyncIterator[Callable[[], Awaitable[Sequence[Alert]]] | str]:
    """Yield a function that runs the checks on the configured database, or why there is none."""
    url = os.environ.get(URL_VARIABLE)
    if not url:
        yield f"compute elements and pilots: {URL_VARIABLE} is not set here"
        return
    from gubbins.db.sql import MyPilotDB  # slow to import
    from gubbins.logic import my_pilots as logic

    database = MyPilotDB(url)
    async with database.engine_context():

        async def run_checks() -> list[Alert]:
            hour_ago = clock.now() - timedelta(hours=1)
            ended = await logic.count_ended_pilots(database, hour_ago)
            in_downtime = await logic.ces_in_downtime(database, hour_ago)
            ces = [ce for ce in await logic.list_ces(database) if ce["name"] not in in_downtime]
            return find_alerts(ces, ended)

        yield run_checks


def find_alerts(ces: Sequence[Mapping[str, Any]], ended: Mapping[str, Mapping[str, int]]) -> list[Alert]:
    """Check compute elements.

    Args:
        ces: compute elements, as of `list_ces`.
        ended: {compute element: {state: pilots that ended within the past hour}}.
    """
    return [
        alert
        for ce in ces
        for alert in (*_banned(ce), *_circuits(ce), *_missing(ce), *_failing(ce, ended.get(ce["name"], {})))
    ]


def _banned(ce: Mapping[str, Any]) -> Iterator[Alert]:
    if ce["banned_at"] is not None:
        yield Alert(
            check="ce_banned",
            severity=Severity.WARNING,
            summary=f"{ce['name']} is banned, with {ce['active']} pilots that are not polled: "
            f"{ce['ban_reason'] or 'no reason was given'}",
            remedy=f"`gubbins ce enable {quote(ce['name'])}` lifts the ban",
            count=max(1, ce["active"]),
            subject=ce["name"],
            since=ce["banned_at"],
            path="/pilots?state=banned",
        )


def _is_called(ce: Mapping[str, Any], call: str) -> bool:
    """True if there are calls, one of which may close the circuit: a closed CE is polled until it is empty."""
    return ce["banned_at"] is None and (ce["enabled"] or (call == CECall.STATUS and ce["active"] > 0))


def _circuits(ce: Mapping[str, Any]) -> Iterator[Alert]:
    for call, circuit in ce["circuits"].items():
        if circuit["state"] != CircuitState.CLOSED and _is_called(ce, call):
            failed = counted(circuit["failures"], f"{call} call has", f"{call} calls in a row have")
            yield Alert(
                check="ce_circuit_open",
                severity=Severity.CRITICAL,
                summary=f"{ce['name']}: {failed} failed: {circuit['last_error']}",
                remedy=f"resolve the error, then `gubbins ce enable {quote(ce['name'])}`, or wait for the next "
                "probe",
                count=circuit["failures"],
                subject=f"{ce['name']} {call}",
                path="/pilots?state=failing",
            )


def _missing(ce: Mapping[str, Any]) -> Iterator[Alert]:
    from gubbins.logic.my_pilots.circuits import missing_pilots  # slow to import

    if _is_called(ce, CECall.STATUS) and (why := missing_pilots(ce)) is not None:
        yield Alert(
            check="ce_pilots_missing",
            severity=Severity.CRITICAL,
            summary=f"{ce['name']} gets no more pilots: {why}",
            remedy="check with the account of the pilots whether the site lists their jobs",
            count=max(ce["missing"], ce["never_seen"] or 0),
            subject=ce["name"],
            path=f"/pilots?ce={ce['name']}",
        )


def _failing(ce: Mapping[str, Any], ended: Mapping[str, int]) -> Iterator[Alert]:
    failed = ended.get(MyPilotStatus.FAILED, 0)
    total = failed + ended.get(MyPilotStatus.DONE, 0)
    if total >= _MIN_ENDED and failed >= _WARNING_SHARE * total:
        yield Alert(
            check="ce_pilots_failing",
            severity=Severity.CRITICAL if failed >= _CRITICAL_SHARE * total else Severity.WARNING,
            summary=f"{ce['name']}: {failed:,} of {total:,} pilots that ended within the past hour have failed",
            remedy=f"check their output; to drain it meanwhile: `gubbins ce disable {quote(ce['name'])}`",
            count=failed,
            subject=ce["name"],
            path=f"/pilots?ce={ce['name']}",
        )
