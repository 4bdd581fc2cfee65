"""How schedules look: as a table, as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import typer

from .errors import mask, one_line

if TYPE_CHECKING:
    from ..plumbing.scheduler import ScheduleState
    from ..plumbing.scheduler.overview import Outcome

_WIDTH_WITHOUT_TERMINAL = 220
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
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not states:
        typer.echo("no schedules", err=True)
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH_WITHOUT_TERMINAL)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("schedule", "state", "next run (UTC)", "last run (UTC)", "last outcome", "rule", "says"):
        table.add_column(column, overflow="fold", no_wrap=column == "schedule")
    for state in states:
        table.add_row(
            Text(state.id, style="cyan"),
            Text(_state(state)),
            _time(state.next_run),
            _time(state.last_run),
            Text(_outcome(state.outcome)),
            Text(state.rule or "-"),
            state.source or "-",
        )
    console.print(table)


def _state(state: ScheduleState) -> str:
    said = str(state.state)
    if state.paused_since is not None and said != "paused":
        said += ", paused"
    if state.problem is not None:
        said += f": {one_line(state.problem)[:_LONGEST_PROBLEM]}"
    return said if state.activity is None else f"{said}, {state.activity}"


def _time(moment: datetime | None) -> str:
    return "-" if moment is None else f"{moment:%Y-%m-%d %H:%M:%S}"


def _outcome(outcome: Outcome | None) -> str:
    if outcome is None:
        return "-"
    said = "ok" if outcome.ok else f"failed: {outcome.error}"
    return f"{said}, {outcome.seconds:g} s, {_time(outcome.ended)}"
