"""How schedules look: as a table, as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ..errors import mask, shortened_line
from ..output import show_table, table

if TYPE_CHECKING:
    from ...plumbing.scheduler import ScheduleState
    from ...plumbing.scheduler.overview import Outcome

_LONGEST_PROBLEM = 60


def record(state: ScheduleState) -> dict[str, Any]:
    """A schedule with everything, times in ISO 8601."""
    from dataclasses import asdict

    shown = asdict(state)
    if state.outcome is not None:
        shown["outcome"]["message"] = None if state.outcome.message is None else mask(state.outcome.message)
    if state.problem is not None:
        shown["problem"] = mask(state.problem)
    return _plain(shown)


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.isoformat()
        if isinstance(value, datetime)
        else _plain(value)
        if isinstance(value, dict)
        else value
        for name, value in fields.items()
    }


def print_table(states: Sequence[ScheduleState]) -> None:
    """One line for each."""
    rows = [
        (
            state.id,
            _state(state),
            _time(state.next_run),
            _time(state.last_run),
            _outcome(state.outcome),
            state.rule or "-",
            state.source or "-",
        )
        for state in states
    ]
    columns = ("schedule", "state", "next run (UTC)", "last run (UTC)", "last outcome", "rule", "says")
    show_table(table(columns, rows), "no schedules")


def _state(state: ScheduleState) -> str:
    said = str(state.state)
    if state.paused_since is not None and said != "paused":
        said += ", paused"
    if state.problem is not None:
        said += f": {shortened_line(state.problem, _LONGEST_PROBLEM)}"
    return said if state.activity is None else f"{said}, {state.activity}"


def _time(moment: datetime | None) -> str:
    return "-" if moment is None else f"{moment:%Y-%m-%d %H:%M:%S}"


def _outcome(outcome: Outcome | None) -> str:
    if outcome is None:
        return "-"
    said = "ok" if outcome.ok else f"failed: {outcome.error}"
    return f"{said}, {outcome.seconds:g} s, {_time(outcome.ended)}"
