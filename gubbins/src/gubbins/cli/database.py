"""`gubbins db`: make the tables, and take them to the revision that this version of the software needs."""

from __future__ import annotations

__all__ = ["db_app"]

import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from .session import CommandError, echo, emit, in_database

if TYPE_CHECKING:
    from diracx.tasks.plumbing.sql.migrations import Migrations, Move

T = TypeVar("T")
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]

db_app = typer.Typer(
    help="""The database: its tables, and their revisions.

A new version of gubbins may need new columns or indexes. Before its first start:

\b
    gubbins db current             # what is there, what is to do
    gubbins db upgrade             # do it; all rows are kept

and before an older version is installed again, `gubbins db downgrade REVISION`.""",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@db_app.command("init")
def init_database(as_json: AsJson = False) -> None:
    """Create the tables in a database that has none. Harmless when they exist.

    One of an older version is left as it is: `gubbins db upgrade` takes that to the present one.
    """
    created = in_database(lambda db: db.create_tables())
    if as_json:
        emit({"created": created})
    else:
        echo("Tables created." if created else "All tables exist; nothing to do.")


@db_app.command("current")
def show_current(
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 when an upgrade is needed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show which revision the database is at, and what an upgrade would do. Changes nothing."""
    state = _migrations(lambda migrations, url: migrations.current(url))
    if as_json:
        emit({"database": "MyPilotDB", **asdict(state)})
    else:
        unstamped = " (recognised by its tables)" if state.revision and not state.stamped else ""
        echo(f"MyPilotDB is at {state.revision or 'base: it has no tables'}{unstamped}, needed: {state.head}")
        for step in state.pending:
            echo(f"  to do: {step.revision} {step.what}")
    if check and state.pending:
        raise typer.Exit(1)


@db_app.command("upgrade")
def upgrade(
    revision: Annotated[str, typer.Argument(metavar="[REVISION]", help="Up to this one.")] = "head",
    as_json: AsJson = False,
) -> None:
    """Take the database to the newest revision, or to REVISION. All rows are kept; repeating it does no harm.

    An empty database gets its tables. One that has tables but no revision (as by `python -m diracx.db init-sql`)
    is recognised. Several of these at once wait for each other. Stop workers and API before: they would wait
    for locks, or miss what is being added.
    """
    _report(_migrations(lambda migrations, url: migrations.upgrade(url, revision)), as_json)


@db_app.command("downgrade")
def downgrade(
    revision: Annotated[str, typer.Argument(metavar="REVISION", help="Down to this one; base: no tables.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Take the database back to REVISION, for an older version of the software.

    What that does not know is lost.
    """
    if not yes:
        what = "drop its tables with all pilots" if revision == "base" else f"lose what {revision} does not know"
        question = f"Take MyPilotDB back to {revision}, and {what}?"
        if not sys.stdin.isatty():
            raise CommandError(f"{question} There is no terminal to ask on; add --yes", 2)
        if not typer.confirm(question, err=True):
            raise CommandError("nothing was changed")
    _report(_migrations(lambda migrations, url: migrations.downgrade(url, revision)), as_json)


def _migrations(work: Callable[[Migrations, str], Awaitable[T]]) -> T:
    from .session import database_url

    def run(db: Any) -> Awaitable[T]:
        return work(db.migrations, database_url())

    return in_database(run)


def _report(move: Move, as_json: bool) -> None:
    if as_json:
        emit({"database": "MyPilotDB", **asdict(move)})
        return
    if move.recognised:
        echo(f"MyPilotDB had no version, and was recognised as {move.before}")
    for step in move.steps:
        echo(f"  done: {step.revision} {step.what}")
    echo(f"MyPilotDB is at {move.after or 'base: it has no tables'}")
