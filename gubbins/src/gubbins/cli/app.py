"""The commands of `gubbins`."""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from diracx.tasks.cli.errors import CliError, UsageProblem
from diracx.tasks.cli.migrations import add_migration_commands
from diracx.tasks.cli.options import JsonOption, command_group
from diracx.tasks.cli.output import echo
from diracx.tasks.operations.audit import listed
from diracx.tasks.plumbing._util.printable import printable

from gubbins.db.registry import open_registry
from gubbins.domain import clock
from gubbins.domain.audit_actions import AuditAction
from gubbins.domain.pilot_states import MyPilotStatus
from gubbins.logic import my_pilots as logic

from . import dirac_import, reconciliation
from .downtimes import downtime_app
from .session import NO_DATABASE, emit, in_database, me, recorded, table

_HELP = """Compute elements and pilots.

All commands work on the database named in DIRACX_DB_URL_MYPILOTDB, for example
sqlite+aiosqlite:////var/lib/gubbins/pilots.db. What changes something is written to the audit log of the task
system at DIRACX_TASKS_REDIS_URL. A first session:

\b
    gubbins db init
    gubbins ce load ces.yaml
    gubbins ce list
    gubbins pilots summary

Exit codes: 0 done, 1 it did not work, 2 bad input."""

_CE_FILE_HELP = """Make the compute elements be as in a YAML FILE (- reads standard input).

The file is checked as a whole first, and loaded in one transaction: all of it or nothing. Loading it again
changes nothing. Compute elements that it does not mention are left alone.

\b
    compute_elements:
      - name: ce01.example.org       # required, unique
        capacity: 20                 # required, slots for pilots of all VOs, >= 0
        success_rate: 0.95           # 0.0-1.0, default 1.0
        enabled: true                # left out: as it is, or true when new
        vos: [lhcb, dteam]           # left out: all VOs; {lhcb: {account: prod}} for
                                     # settings that differ for a VO
        backend: simulated           # or local, or any other installed one
        settings: {run_seconds: 60}  # what the back end understands
        rules:                       # all optional
          policy: waiting_jobs       # or fill, the default
          share: 1                   # a VO's part, relative to those of the others
          max_waiting: 10            # pilots of one VO that wait here
          max_per_cycle: 5           # new ones of one VO in a round
          trickle: 1                 # with waiting_jobs: that many even without jobs
          vos: {lhcb: {share: 2}}    # what is different for one VO
          site: LCG.Example.org      # which waiting jobs can run here; also tags,
          processors: 8              # required_tags, platform, max_cpu_seconds…
          timeout_seconds: 60        # `gubbins ce show` shows all the others
        queues:                      # optional: each is a compute element of its own,
          short:                     # here ce01.example.org:short, with settings,
            settings: {seed: 2}      # rules, capacity of its own
            rules: {max_cpu_seconds: 3600}

\b
Settings of the back ends:
    simulated  seed, queue_seconds, run_seconds
    local      directory, scripts (text per VO), default_script, environment,
               kill_after_seconds, keep (none, failed or all)
    ssh        host, port, username, known_hosts, client_keys, workdir, and as local"""

_DB_HELP = """The database: its tables, and their revisions.

A new version of gubbins may need new columns or indexes. Before its first start:

\b
    gubbins db current             # what is there, what is to do
    gubbins db upgrade             # do it; all rows are kept

and before an older version is installed again, `gubbins db downgrade REVISION`."""

# Plain help: Rich would take `[lhcb, dteam]` for markup and refill the examples.
app = command_group(
    "gubbins",
    _HELP,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"max_content_width": 110},
)
ce_app = command_group(
    "ce", "Compute elements: load from a file, list, show, open, close, ban, downtimes.", rich_markup_mode=None
)
pilots_app = command_group(
    "pilots", "Pilots: list, count, show, output, cancel, reconcile.", rich_markup_mode=None
)
db_app = command_group("db", _DB_HELP, rich_markup_mode=None)
ce_app.add_typer(downtime_app)
pilots_app.command("reconcile")(reconciliation.reconcile_pilots)
ce_app.command("import-dirac", help=dirac_import.HELP)(dirac_import.import_dirac)
for _group in (ce_app, pilots_app, db_app):
    app.add_typer(_group)

CEName = Annotated[str, typer.Argument(help="Name of the compute element.", metavar="NAME")]
PilotId = Annotated[
    int,
    typer.Argument(help="Id of the pilot, as in `gubbins pilots list`.", metavar="ID", min=1, max=2**63 - 1),
]
OfVO = Annotated[str | None, typer.Option("--vo", help="Only this VO's.")]


@ce_app.command("load", help=_CE_FILE_HELP)
def load_ces(file: Annotated[Path, typer.Argument(metavar="FILE")], as_json: JsonOption = False) -> None:
    name = "standard input" if str(file) == "-" else str(file)
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        specs = logic.parse_ce_file(text)
    except logic.CEFileError as error:
        lines = [f"{name}: {line}" for line in str(error).splitlines()]
        raise CliError(str(error), exit_code=2, lines=lines) from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageProblem(f"cannot read {name}: {reason}") from error
    outcome = recorded(
        AuditAction.LOAD_CES,
        listed([spec.name for spec in specs]),
        lambda db: logic.load_ces(db, specs),
        lambda done: ", ".join(f"{len([*found])} {what}" for what, found in groupby(sorted(done.values()))),
    )
    if as_json:
        emit(outcome)
    else:
        for ce_name, what in outcome.items():
            echo(f"{ce_name}: {what}")


@ce_app.command("list")
def list_ces(vo: OfVO = None, as_json: JsonOption = False) -> None:
    """Show the compute elements (with --vo: those that serve it) and how full they are."""
    ces = in_database(lambda db: logic.list_ces(db, vo))
    if as_json:
        emit(ces)
        return
    table(
        "Compute elements",
        ("name", "state", "circuit", "backend", "VOs", "success rate", "capacity", "active", "free", "last error"),
        [
            (
                ce["name"],
                _state_of(ce),
                _circuit_of(ce),
                ce["backend"],
                "all" if ce["vos"] is None else ", ".join(ce["vos"]),
                ce["success_rate"],
                ce["capacity"],
                ce["active"],
                ce["available_slots"],
                ce["last_error"],
            )
            for ce in ces
        ],
    )


def _state_of(ce: dict[str, Any]) -> str:
    if ce["enabled"] and ce["downtime"] is not None:
        return "downtime"
    return "open" if ce["enabled"] else "closed" if ce["banned_at"] is None else "banned"


def _circuit_of(ce: dict[str, Any]) -> str:
    failing = [f"{call} {c['state']}" for call, c in ce["circuits"].items() if c["state"] != "closed"]
    return ", ".join(failing) or "closed"


@ce_app.command("show")
def show_ce(name: CEName, as_json: JsonOption = False) -> None:
    """Show one compute element: its state, its circuits, its rules."""
    ce: dict[str, Any] = in_database(lambda db: logic.get_ce(db, name))
    if as_json:
        emit(ce)
        return
    parts = ("circuits", "rules", "settings", "waiting", "reports")
    circuits, rules, settings, waiting, reports = (ce.pop(key) for key in parts)
    if (downtime := ce["downtime"]) is not None:
        ce["downtime"] = downtime.describe(clock.now())
    table(f"Compute element {name}", ("field", "value"), [("state", _state_of(ce)), *ce.items()])
    table(
        "Circuits",
        ("call", "state", "failures in a row", "open until (UTC)", "last error", "at (UTC)"),
        [
            (call, *(c[key] for key in ("state", "failures", "open_until", "last_error", "last_error_at")))
            for call, c in circuits.items()
        ],
    )
    table("Rules", ("rule", "value"), [*((k, v) for k, v in rules.items() if k != "vos"), *_rules_of_vos(rules)])
    if waiting:
        table("Waiting pilots", ("for", "pilots"), list(waiting.items()))
    if reports:
        table("Reports of pilots", ("of", "pilots"), list(reports.items()))
    table("Settings of the back end", ("setting", "value"), list(settings.items()))


def _rules_of_vos(rules: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        (f"{rule} of {vo}", value)
        for vo, own in rules["vos"].items()
        for rule, value in own.items()
        if value is not None
    ]


@ce_app.command("enable")
def enable_ce(name: CEName, as_json: JsonOption = False) -> None:
    """Open a compute element for new pilots.

    Lifts a ban, and ends the pause of one that failed too often: it is called again at once.
    """
    _set_enabled(name, True, as_json)


@ce_app.command("disable")
def disable_ce(name: CEName, as_json: JsonOption = False) -> None:
    """Close a compute element for new pilots: drain it.

    The pilots that it has go on and are followed to their ends. Lifts a ban.
    """
    _set_enabled(name, False, as_json)


@ce_app.command("ban")
def ban_ce(
    name: CEName,
    reason: Annotated[str | None, typer.Option("--reason", help="Why, for the others.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Ban a compute element.

    It gets no pilots, and those it has are not polled: they stay as they are until `gubbins ce enable`, or
    `gubbins ce disable`, which follows them to their ends.
    """
    changed = recorded(
        AuditAction.BAN_CE,
        name,
        lambda db: logic.ban_ce(db, name, reason=reason),
        lambda changed: ("banned" if changed else "was banned already") + (f": {reason}" if reason else ""),
    )
    if as_json:
        emit({"name": name, "banned": True, "changed": changed})
    else:
        echo(f"{name}: banned{'' if changed else ' already'}")


def _set_enabled(name: str, enabled: bool, as_json: bool) -> None:
    state = "open" if enabled else "closed"
    changed = recorded(
        AuditAction.OPEN_CE if enabled else AuditAction.CLOSE_CE,
        name,
        lambda db: logic.set_ce_enabled(db, name, enabled),
        lambda changed: state if changed else f"was {state} already",
    )
    if as_json:
        emit({"name": name, "enabled": enabled, "changed": changed})
    else:
        echo(f"{name}: {'enabled' if enabled else 'disabled'}{'' if changed else ' already'}")


@pilots_app.command("list")
def list_pilots(
    vo: OfVO = None,
    ce_name: Annotated[str | None, typer.Option("--ce", help="Only at this compute element.")] = None,
    status: Annotated[
        MyPilotStatus | None, typer.Option("--status", case_sensitive=False, help="Only in this state.")
    ] = None,
    job: Annotated[
        int | None, typer.Option("--job", min=1, max=2**63 - 1, help="Only those on which this job ran.")
    ] = None,
    stale: Annotated[
        bool, typer.Option("--stale", help="Only running ones whose heartbeats have stopped.")
    ] = False,
    page: Annotated[int, typer.Option(min=1, help="Which page.")] = 1,
    per_page: Annotated[int, typer.Option(min=1, max=10_000, help="Pilots on a page.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """List pilots, newest first."""

    async def search(db: Any) -> tuple[int, list[dict[str, Any]]]:
        stamps = None
        if job is not None:
            async with open_registry() as registry:
                stamps = await logic.stamps_of_job(registry, job)
        return await logic.search_pilots(
            db, vo=vo, ce_name=ce_name, status=status, stamps=stamps, stale=stale, page=page, per_page=per_page
        )

    total, pilots = in_database(search)
    if as_json:
        emit({"items": pilots, "total": total, "page": page, "per_page": per_page})
        return
    columns = (
        "pilot_id",
        "vo",
        "ce_name",
        "status",
        "submitted_at",
        "last_update",
        "waiting_reason",
        "last_error",
    )
    table(
        f"{len(pilots)} of {total} pilots (page {page})",
        ("id", "VO", "CE", "state", "submitted (UTC)", "last change (UTC)", "waits for", "last error"),
        [tuple(pilot[column] for column in columns) for pilot in map(_with_report, pilots)],
    )


def _with_report(pilot: dict[str, Any]) -> dict[str, Any]:
    """The pilot, with its report beside its state."""
    report = "stale" if pilot["stale"] else pilot["outcome"]
    return {**pilot, "status": f"{pilot['status']} ({report})"} if report else pilot


@pilots_app.command("summary")
def summarise_pilots(vo: OfVO = None, as_json: JsonOption = False) -> None:
    """Count pilots by VO, compute element and state.

    And the running ones that are stale (their heartbeats have stopped), and those that reported that they found no
    work.
    """

    async def count(db: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return await logic.count_pilots(db, vo), await logic.count_reports(db, vo)

    summary, reports = in_database(count)
    if as_json:
        for vo_name, ces in reports.items():
            for ce_name, counts in ces.items():
                summary.setdefault(vo_name, {}).setdefault(ce_name, {}).update(counts)
        emit(summary)
        return
    reported = ("stale", "no work")
    table(
        "Pilots",
        ("VO", "CE", *(str(status) for status in MyPilotStatus), *reported),
        [
            (
                vo_name,
                ce_name,
                *(states.get(status, 0) for status in MyPilotStatus),
                *(reports.get(vo_name, {}).get(ce_name, {}).get(name, 0) for name in reported),
            )
            for vo_name, ces in summary.items()
            for ce_name, states in ces.items()
        ],
    )


@pilots_app.command("show")
def show_pilot(pilot_id: PilotId, as_json: JsonOption = False) -> None:
    """Show one pilot, every step it made, and the jobs that ran on it."""

    async def show(db: Any) -> dict[str, Any]:
        pilot = await logic.get_pilot(db, pilot_id)
        async with open_registry() as registry:
            return {**pilot, "jobs": await logic.jobs_of_pilot(registry, pilot)}

    pilot = in_database(show)
    if as_json:
        emit(pilot)
        return
    history, jobs = pilot.pop("history"), pilot.pop("jobs")
    if jobs is not None:
        pilot["jobs"] = ", ".join(map(str, jobs))
    table(f"Pilot {pilot_id}", ("field", "value"), list(pilot.items()))
    table("History", ("state", "at (UTC)", "reason"), [(s["status"], s["at"], s["reason"]) for s in history])


@pilots_app.command("cancel")
def cancel_pilot(pilot_id: PilotId, as_json: JsonOption = False) -> None:
    """Cancel a pilot.

    It is FAILED once its compute element has confirmed that it ended; the next checks find out.
    """
    pilot: dict[str, Any] = recorded(
        AuditAction.CANCEL_PILOT,
        str(pilot_id),
        lambda db: logic.cancel_pilot(db, pilot_id, by=me()),
        lambda pilot: f"requested at {pilot['ce_name']}",
    )
    if as_json:
        emit(pilot)
    else:
        echo(f"pilot {pilot_id}: cancellation requested at {pilot['ce_name']} (now {pilot['status']})")


@pilots_app.command("output")
def show_output(pilot_id: PilotId, as_json: JsonOption = False) -> None:
    """Print the output of a pilot, its stdout on stdout and its stderr on stderr.

    For a pilot that still runs, the output so far.
    """
    output: dict[str, Any] = in_database(lambda db: logic.get_pilot_output(db, pilot_id))
    if as_json:
        emit(output)
    else:
        typer.echo(printable(output["stdout"]), nl=False)
        typer.echo(printable(output["stderr"]), nl=False, err=True)


@db_app.command("init")
def init_database(as_json: JsonOption = False) -> None:
    """Create the tables in a database that has none. Harmless when they exist.

    One of an older version is left as it is: `gubbins db upgrade` takes that to the present one.
    """
    created = in_database(lambda db: db.create_tables(), tables=False)
    if as_json:
        emit({"created": created})
    else:
        echo("Tables created." if created else "All tables exist; nothing to do.")


add_migration_commands(db_app, "gubbins db", "MyPilotDB", NO_DATABASE)
