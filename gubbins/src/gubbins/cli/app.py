"""The commands of `gubbins`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from diracx.tasks.cli.errors import CliError
from diracx.tasks.cli.migrations import add_migration_commands
from diracx.tasks.cli.options import JsonOption, command_group
from diracx.tasks.cli.output import echo, print_json, show
from diracx.tasks.operations.audit import listed

from gubbins.db.registry import open_registry
from gubbins.domain import clock
from gubbins.domain.audit_actions import AuditAction
from gubbins.domain.pilot_states import MyPilotStatus
from gubbins.logic import my_pilots as logic

from . import dirac_import, reconciliation, tables
from .downtimes import downtime_app
from .session import (
    NO_DATABASE,
    audited,
    current_operator,
    print_result,
    print_table,
    read_input,
    with_database,
)

_HELP = """Manage compute elements and pilots.

All commands use the database of DIRACX_DB_URL_MYPILOTDB, for example
sqlite+aiosqlite:////var/lib/gubbins/pilots.db. Changes are written to the audit log of the task system at
DIRACX_TASKS_REDIS_URL. A first session:

\b
    gubbins db init
    gubbins ce load ces.yaml
    gubbins ce list
    gubbins pilots summary

Exit codes: 0 success, 1 failure, 2 invalid input."""

_CE_FILE_HELP = """Create or update compute elements from a file.

FILE is in YAML; - reads standard input. It is validated and loaded as a whole, in one transaction. Loading it
again changes nothing. Compute elements that are not in it do not change.

\b
    compute_elements:
      - name: ce01.example.org       # required, unique
        capacity: 20                 # required, slots for pilots of all VOs, >= 0
        success_rate: 0.95           # 0.0-1.0, default 1.0
        enabled: true                # left out: as it is, or true when new
        vos: [lhcb, dteam]           # left out: all VOs; {lhcb: {account: prod}} for
                                     # settings that differ for a VO
        backend: simulated           # or local, or any other installed one
        settings: {run_seconds: 60}  # settings of the back end
        rules:                       # all optional
          policy: waiting_jobs       # or fill, the default
          share: 1                   # share of a VO, relative to other VOs
          max_waiting: 10            # limit of waiting pilots of a VO
          max_per_cycle: 5           # limit of new pilots of a VO per round
          trickle: 1                 # with waiting_jobs: pilots without waiting jobs
          vos: {lhcb: {share: 2}}    # different rules for a VO
          site: LCG.Example.org      # which waiting jobs can run here; also tags,
          processors: 8              # required_tags, platform, max_cpu_seconds…
          timeout_seconds: 60        # `gubbins ce show` shows all the others
        queues:                      # optional: each is a separate compute element,
          short:                     # here ce01.example.org:short, with its own
            settings: {seed: 2}      # settings, rules, capacity
            rules: {max_cpu_seconds: 3600}

\b
Settings of the back ends:
    simulated  seed, queue_seconds, run_seconds
    local      directory, scripts (text per VO), default_script, environment,
               kill_after_seconds, keep (none, failed or all)
    ssh        host, port, username, known_hosts, client_keys, workdir, and as local
    slurm, batch, arc, htcondor   see "Connect a compute element" in the documentation"""

_DB_HELP = """Create and migrate the tables of the database.

A new version of gubbins may need new columns or indexes. Before its first start:

\b
    gubbins db current             # show the revision and pending migrations
    gubbins db upgrade             # migrate; all rows are kept

and before an older version is installed again, `gubbins db downgrade REVISION`."""

# Without Rich, which would interpret `[lhcb, dteam]` as markup and rewrap the examples.
app = command_group(
    "gubbins",
    _HELP,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"max_content_width": 110},
)
ce_app = command_group(
    "ce", "Load, list, enable, disable and ban compute elements; downtimes.", rich_markup_mode=None
)
pilots_app = command_group(
    "pilots", "List, count, show, cancel and reconcile pilots; their output.", rich_markup_mode=None
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
    name, text = read_input(file)
    try:
        specs = logic.parse_ce_file(text)
    except logic.CEFileError as error:
        lines = [f"{name}: {line}" for line in str(error).splitlines()]
        raise CliError(str(error), exit_code=2, lines=lines) from error
    outcome = audited(
        AuditAction.LOAD_CES,
        listed([spec.name for spec in specs]),
        lambda db: logic.load_ces(db, specs),
        lambda done: ", ".join(f"{number} {change}" for change, number in sorted(Counter(done.values()).items())),
    )
    text = "\n".join(f"{ce_name}: {change}" for ce_name, change in outcome.items())
    print_result(outcome, text, as_json=as_json)


@ce_app.command("list")
def list_ces(vo: OfVO = None, as_json: JsonOption = False) -> None:
    """List compute elements and their occupancy."""
    show(tables.COMPUTE_ELEMENTS, with_database(lambda db: logic.list_ces(db, vo)), as_json)


@ce_app.command("show")
def show_ce(name: CEName, as_json: JsonOption = False) -> None:
    """Show a compute element with its circuits, rules, settings."""
    ce: dict[str, Any] = with_database(lambda db: logic.get_ce(db, name))
    if as_json:
        print_json(ce)
        return
    parts = ("circuits", "rules", "settings", "waiting", "reports")
    circuits, rules, settings, waiting, reports = (ce.pop(key) for key in parts)
    if (downtime := ce["downtime"]) is not None:
        ce["downtime"] = downtime.describe(clock.now())
    print_table(f"Compute element {name}", ("field", "value"), [("state", tables.state_of(ce)), *ce.items()])
    print_table(
        "Circuits",
        ("call", "state", "failures in a row", "open until (UTC)", "last error", "at (UTC)"),
        [
            (call, *(c[key] for key in ("state", "failures", "open_until", "last_error", "last_error_at")))
            for call, c in circuits.items()
        ],
    )
    print_table(
        "Rules", ("rule", "value"), [*((k, v) for k, v in rules.items() if k != "vos"), *_rules_of_vos(rules)]
    )
    if waiting:
        print_table("Waiting or held pilots", ("for", "pilots"), list(waiting.items()))
    if reports:
        print_table("Reports of pilots", ("of", "pilots"), list(reports.items()))
    print_table("Settings of the back end", ("setting", "value"), list(settings.items()))


def _rules_of_vos(rules: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        (f"{rule} of {vo}", value)
        for vo, own in rules["vos"].items()
        for rule, value in own.items()
        if value is not None
    ]


@ce_app.command("enable")
def enable_ce(name: CEName, as_json: JsonOption = False) -> None:
    """Enable a compute element for new pilots. Lifts a ban, and closes its circuits."""
    _set_enabled(name, True, as_json)


@ce_app.command("disable")
def disable_ce(name: CEName, as_json: JsonOption = False) -> None:
    """Disable a compute element for new pilots, to drain it.

    Active pilots continue. Lifts a ban.
    """
    _set_enabled(name, False, as_json)


@ce_app.command("ban")
def ban_ce(
    name: CEName,
    reason: Annotated[str | None, typer.Option("--reason", help="Reason, shown to all users.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Ban a compute element from submissions and polls.

    `gubbins ce enable` and `gubbins ce disable` lift the ban.
    """
    changed = audited(
        AuditAction.BAN_CE,
        name,
        lambda db: logic.ban_ce(db, name, reason=reason),
        lambda changed: ("banned" if changed else "was banned already") + (f": {reason}" if reason else ""),
    )
    text = f"{name}: banned{'' if changed else ' already'}"
    print_result({"name": name, "banned": True, "changed": changed}, text, as_json=as_json)


def _set_enabled(name: str, enabled: bool, as_json: bool) -> None:
    state = "open" if enabled else "closed"
    changed = audited(
        AuditAction.OPEN_CE if enabled else AuditAction.CLOSE_CE,
        name,
        lambda db: logic.set_ce_enabled(db, name, enabled),
        lambda changed: state if changed else f"was {state} already",
    )
    text = f"{name}: {'enabled' if enabled else 'disabled'}{'' if changed else ' already'}"
    print_result({"name": name, "enabled": enabled, "changed": changed}, text, as_json=as_json)


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

    total, pilots = with_database(search)
    if as_json:
        print_json({"items": pilots, "total": total, "page": page, "per_page": per_page})
        return
    shown = ("pilot_id", "vo", "ce_name", "status", "submitted_at", "last_update", "waiting_reason", "last_error")
    print_table(
        f"{len(pilots)} of {total} pilots (page {page})",
        ("id", "VO", "CE", "state", "submitted (UTC)", "last change (UTC)", "waits for", "last error"),
        [tuple(pilot[column] for column in shown) for pilot in map(_with_report, pilots)],
    )


def _with_report(pilot: dict[str, Any]) -> dict[str, Any]:
    """Add the report of the pilot to its state."""
    report = "stale" if pilot["stale"] else pilot["outcome"]
    return {**pilot, "status": f"{pilot['status']} ({report})"} if report else pilot


@pilots_app.command("summary")
def summarise_pilots(vo: OfVO = None, as_json: JsonOption = False) -> None:
    """Count pilots by VO, compute element and state.

    Also counts those that reported no work, and stale ones: running pilots whose heartbeats have stopped.
    """

    async def count(db: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return await logic.count_pilots(db, vo), await logic.count_reports(db, vo)

    summary, reports = with_database(count)
    if as_json:
        for vo_name, ces in reports.items():
            for ce_name, counts in ces.items():
                summary.setdefault(vo_name, {}).setdefault(ce_name, {}).update(counts)
        print_json(summary)
        return
    reported = ("stale", "no work")
    print_table(
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
    """Show one pilot with its history and the jobs that ran on it."""

    async def find(db: Any) -> dict[str, Any]:
        pilot = await logic.get_pilot(db, pilot_id)
        async with open_registry() as registry:
            return {**pilot, "jobs": await logic.jobs_of_pilot(registry, pilot)}

    pilot = with_database(find)
    if as_json:
        print_json(pilot)
        return
    history, jobs = pilot.pop("history"), pilot.pop("jobs")
    if jobs is not None:
        pilot["jobs"] = ", ".join(map(str, jobs))
    print_table(f"Pilot {pilot_id}", ("field", "value"), list(pilot.items()))
    print_table("History", ("state", "at (UTC)", "reason"), [(s["status"], s["at"], s["reason"]) for s in history])


@pilots_app.command("cancel")
def cancel_pilot(pilot_id: PilotId, as_json: JsonOption = False) -> None:
    """Cancel a pilot. It becomes FAILED when its compute element has confirmed the end."""
    pilot: dict[str, Any] = audited(
        AuditAction.CANCEL_PILOT,
        str(pilot_id),
        lambda db: logic.cancel_pilot(db, pilot_id, by=current_operator()),
        lambda pilot: f"requested at {pilot['ce_name']}",
    )
    text = f"pilot {pilot_id}: cancellation requested at {pilot['ce_name']} (now {pilot['status']})"
    print_result(pilot, text, as_json=as_json)


@pilots_app.command("output")
def show_output(pilot_id: PilotId, as_json: JsonOption = False) -> None:
    """Print stdout and stderr of a pilot.

    Each goes to the same stream; of a running pilot, the output so far.
    """
    output: dict[str, Any] = with_database(lambda db: logic.get_pilot_output(db, pilot_id))
    if as_json:
        print_json(output)
    else:
        echo(output["stdout"], nl=False)
        echo(output["stderr"], nl=False, err=True)


@db_app.command("init")
def init_database(as_json: JsonOption = False) -> None:
    """Create the tables, unless they exist. `gubbins db upgrade` migrates those of an older version."""
    created = with_database(lambda db: db.create_tables(), tables=False)
    text = "Tables created." if created else "All tables exist; nothing to do."
    print_result({"created": created}, text, as_json=as_json)


add_migration_commands(db_app, "gubbins db", "MyPilotDB", NO_DATABASE)
