"""Health checks of compute elements among those of the task system (entry point `diracx.tasks_health`)."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

from diracx.tasks.operations.health import Alert, Severity

from gubbins.db import URL_VARIABLE
from gubbins.domain import clock
from gubbins.domain.circuit_breaker import CircuitState
from gubbins.domain.pilot_states import MyPilotStatus

#: Least number of pilots that ended within the past hour for an alert.
_LEAST_ENDED = 4
_WARNING_SHARE = 0.5
_CRITICAL_SHARE = 0.9


@asynccontextmanager
async def source() -> AsyncIterator[Callable[[], Awaitable[Sequence[Alert]]] | str]:
    """Yield the function that runs the checks on the database of the environment, or why there is none."""
    url = os.environ.get(URL_VARIABLE)
    if not url:
        yield f"compute elements and pilots: {URL_VARIABLE} is not set here"
        return
    # Without such a database these slow imports are not needed.
    from gubbins.db.sql import MyPilotDB
    from gubbins.logic import my_pilots as logic

    database = MyPilotDB(url)
    async with database.engine_context():

        async def ask() -> list[Alert]:
            hour_ago = clock.now() - timedelta(hours=1)
            ended = await logic.count_ended_pilots(database, hour_ago)
            quiet = await logic.ces_in_downtime(database, hour_ago)
            return find_alerts([ce for ce in await logic.list_ces(database) if ce["name"] not in quiet], ended)

        yield ask


def find_alerts(ces: Sequence[Mapping[str, Any]], ended: Mapping[str, Mapping[str, int]]) -> list[Alert]:
    """Alerts about compute elements.

    Args:
        ces: all of them, as `list_ces` has them.
        ended: compute element -> state -> pilots that ended so within the past hour.
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
            summary=f"{ce['name']} is banned, with {ce['active']} pilots that are not followed: "
            f"{ce['ban_reason'] or 'no reason was given'}",
            remedy=f"when the reason is gone: `gubbins ce enable {ce['name']}`",
            count=max(1, ce["active"]),
            subject=ce["name"],
            since=ce["banned_at"],
            path="/pilots?state=banned",
        )


def _circuits(ce: Mapping[str, Any]) -> Iterator[Alert]:
    """A banned compute element is not called: its circuits say nothing new."""
    for call, circuit in ce["circuits"].items() if ce["banned_at"] is None else ():
        if circuit["state"] != CircuitState.CLOSED:
            yield Alert(
                check="ce_circuit_open",
                severity=Severity.CRITICAL,
                summary=f"{ce['name']}: {circuit['failures']} {call} calls in a row have failed: "
                f"{circuit['last_error']}",
                remedy=f"mend it, then `gubbins ce enable {ce['name']}`; it is tried again by itself, too",
                count=circuit["failures"],
                subject=f"{ce['name']} {call}",
                path="/pilots?state=failing",
            )


def _missing(ce: Mapping[str, Any]) -> Iterator[Alert]:
    from gubbins.logic.my_pilots.circuits import missing_pilots  # slow to import, and only of use with a database

    if ce["banned_at"] is None and (why := missing_pilots(ce, ce["active"])) is not None:
        yield Alert(
            check="ce_pilots_missing",
            severity=Severity.CRITICAL,
            summary=f"{ce['name']} gets no more pilots: {why}",
            remedy="see with the account of the pilots if the site lists their jobs",
            count=max(ce["missing"], ce["missing_in_row"] or 0),
            subject=ce["name"],
            path=f"/pilots?ce={ce['name']}",
        )


def _failing(ce: Mapping[str, Any], ended: Mapping[str, int]) -> Iterator[Alert]:
    total, failed = sum(ended.values()), ended.get(MyPilotStatus.FAILED, 0)
    if total >= _LEAST_ENDED and failed >= _WARNING_SHARE * total:
        yield Alert(
            check="ce_pilots_failing",
            severity=Severity.CRITICAL if failed >= _CRITICAL_SHARE * total else Severity.WARNING,
            summary=f"{ce['name']}: {failed:,} of {total:,} pilots that ended within the past hour have failed",
            remedy=f"look at them; drain it meanwhile: `gubbins ce disable {ce['name']}`",
            count=failed,
            subject=ce["name"],
            path=f"/pilots?ce={ce['name']}",
        )
