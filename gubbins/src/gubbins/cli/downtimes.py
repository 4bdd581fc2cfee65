"""The commands of `gubbins ce downtime`."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Any

import typer
from diracx.tasks.cli.errors import UsageProblem
from diracx.tasks.cli.options import JsonOption, command_group
from diracx.tasks.cli.output import show

from gubbins.domain import clock
from gubbins.domain.audit_actions import AuditAction
from gubbins.domain.downtimes import Downtime, parse_moment
from gubbins.logic import my_pilots as logic

from . import tables
from .session import audited, current_operator, print_result, with_database

_HELP = """Downtimes of compute elements.

During a downtime a compute element gets no pilots and raises no alerts; its active pilots are polled as usual.
With --drain-before, submissions stop some hours earlier, so that pilots end in time.

\b
    gubbins ce downtime add ce01.example.org --start 2026-12-01T08:00 --end 2026-12-01T18:00 \\
        --reason "new switches" --drain-before 24
    gubbins ce downtime list
    gubbins ce downtime remove 7"""

downtime_app = command_group("downtime", _HELP, rich_markup_mode=None)


def _moment(text: str | None) -> datetime | None:
    try:
        return None if text is None else parse_moment(text)
    except ValueError as error:
        raise UsageProblem(str(error)) from error


@downtime_app.command("add")
def add_downtime(
    name: Annotated[str, typer.Argument(help="Name of the compute element.", metavar="NAME")],
    reason: Annotated[str, typer.Option("--reason", help="Reason, shown to all users.")],
    start: Annotated[
        str | None, typer.Option("--start", metavar="TIME", help="Start, as 2026-12-01T08:00; default: now.")
    ] = None,
    end: Annotated[str | None, typer.Option("--end", metavar="TIME", help="End.")] = None,
    hours: Annotated[
        float | None, typer.Option("--hours", min=0.01, max=24 * 366, help="Duration, instead of --end.")
    ] = None,
    drain_before: Annotated[
        float,
        typer.Option(
            "--drain-before", min=0, max=24 * 366, metavar="HOURS", help="Stop submissions so long before."
        ),
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Plan a downtime. Times are UTC, unless given with an offset (2026-12-01T08:00+01:00)."""
    if (end is None) == (hours is None):
        raise UsageProblem("give either --end or --hours")
    start_given, end_given = _moment(start), _moment(end)

    async def add(db: Any) -> Downtime:
        starts_at = start_given or clock.now()  # of the database
        try:
            ends_at = end_given or starts_at + timedelta(hours=hours or 0)
        except OverflowError as error:
            raise UsageProblem(f"a downtime cannot start at {starts_at:%Y-%m-%d}") from error
        drain, by = timedelta(hours=drain_before), current_operator()
        return await logic.add_downtime(db, name, starts_at, ends_at, reason, by=by, drain=drain)

    added: Downtime = audited(
        AuditAction.ADD_DOWNTIME, name, add, lambda added: f"{added.id}: {_span(added)}, {added.reason}"
    )
    text = f"{name}: downtime {added.id}, {_span(added)} (no submissions from {added.drain_from:%Y-%m-%d %H:%M})"
    print_result(added, text, as_json=as_json)


def _span(downtime: Downtime) -> str:
    return f"{downtime.starts_at:%Y-%m-%d %H:%M} to {downtime.ends_at:%Y-%m-%d %H:%M} UTC"


@downtime_app.command("list")
def list_downtimes(
    name: Annotated[str | None, typer.Argument(help="Only of this compute element.", metavar="[NAME]")] = None,
    past: Annotated[bool, typer.Option("--past", help="Include downtimes that have ended.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List downtimes that have not ended, the earliest first."""
    show(tables.DOWNTIMES, with_database(lambda db: logic.list_downtimes(db, name, past=past)), as_json)


@downtime_app.command("remove")
def remove_downtime(
    downtime_id: Annotated[int, typer.Argument(help="As in the list.", metavar="ID", min=1, max=2**63 - 1)],
    as_json: JsonOption = False,
) -> None:
    """Remove a downtime. One that has started ends at once."""
    removed: Downtime = audited(
        AuditAction.REMOVE_DOWNTIME,
        str(downtime_id),
        lambda db: logic.remove_downtime(db, downtime_id),
        lambda removed: f"of {removed.ce_name}: {_span(removed)}",
    )
    print_result(removed, f"{removed.ce_name}: downtime {downtime_id} removed ({_span(removed)})", as_json=as_json)
