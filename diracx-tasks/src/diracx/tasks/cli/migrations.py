"""Commands of database migrations: `current`, `upgrade`, `downgrade`."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

import typer

from ..plumbing.sql.migrations import Migrations, Move
from .options import Commands, JsonOption, YesOption
from .output import confirm, report
from .runtime.databases import database_classes, database_url, explained_database

_Result = TypeVar("_Result")


def add_migration_commands(group: Commands, program: str, database: str, missing: str) -> None:
    """Add `current`, `upgrade` and `downgrade` to a group of commands.

    Args:
        program: the command line up to these commands, for their examples.
        database: name as in DIRACX_DB_URL_<NAME>.
        missing: error message where the database is not configured.
    """

    def run(work: Callable[[Migrations, str], Coroutine[Any, Any, _Result]]) -> _Result:
        url = database_url(database, missing)
        with explained_database(database):
            return asyncio.run(work(database_classes(database)[0].migrations, url))

    def report_move(move: Move, as_json: bool) -> None:
        lines = [f"  done: {step.revision} {step.what}" for step in move.steps]
        if move.recognised:
            lines.insert(0, f"{database} had no revision; its tables are those of {move.before}")
        lines.append(f"{database} is at {move.after or 'base: it has no tables'}")
        report({"database": database, **asdict(move)}, lines, as_json, indent=2)

    def current(
        check: Annotated[bool, typer.Option("--check", help="Exit with 1 when an upgrade is needed.")] = False,
        as_json: JsonOption = False,
    ) -> None:
        """Show the revision of the database and the pending migrations. Changes nothing."""
        state = run(lambda migrations, url: migrations.current(url))
        unstamped = " (recognised by its tables)" if state.revision and not state.stamped else ""
        revision = f"{state.revision or 'base: it has no tables'}{unstamped}"
        lines = [f"  to do: {step.revision} {step.what}" for step in state.pending]
        lines.insert(0, f"{database} is at {revision}, needed: {state.head}")
        report({"database": database, **asdict(state)}, lines, as_json, indent=2)
        if check and state.pending:
            raise typer.Exit(1)

    def upgrade(
        revision: Annotated[str, typer.Argument(metavar="[REVISION]", help="Up to this one.")] = "head",
        as_json: JsonOption = False,
    ) -> None:
        """Upgrade the database to the newest revision, or to REVISION. All rows are kept; it can be repeated.

        An empty database gets its tables. The revision of a database without one, as made by `python -m diracx.db
        init-sql`, is detected from its tables. Concurrent upgrades wait for each other. Stop workers and API
        first: they would wait for locks, or lack the columns that are being added.
        """
        report_move(run(lambda migrations, url: migrations.upgrade(url, revision)), as_json)

    def downgrade(
        revision: Annotated[str, typer.Argument(metavar="REVISION", help="Down to this one; base: no tables.")],
        yes: YesOption = False,
        as_json: JsonOption = False,
    ) -> None:
        """Downgrade the database to REVISION.

        For an older version of the software. Columns and tables that REVISION does not have are dropped with their
        data.
        """
        what = "drop its tables with all rows" if revision == "base" else f"drop what {revision} does not have"
        confirm(f"Downgrade {database} to {revision}, and {what}?", yes)
        report_move(run(lambda migrations, url: migrations.downgrade(url, revision)), as_json)

    for command, example in (
        (current, "current --check"),
        (upgrade, "upgrade"),
        (downgrade, "downgrade 0001 --yes"),
    ):
        group.command(help=f"{inspect.getdoc(command)}\n\nExample: {program} {example}")(command)
