"""`db`: take the database of dead letters to the revision that this version of the software needs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from ..errors import explained_database
from ..options import JsonOption, YesOption, command_group
from ..output import confirm, echo, echo_json
from ..runtime.databases import task_db_url

if TYPE_CHECKING:
    from ...plumbing.sql.migrations import Migrations, Move

_Answer = TypeVar("_Answer")

app = command_group(
    "db",
    "The schema of the database of dead letters, DIRACX_DB_URL_TASKDB.\n\n"
    "A new version of diracx-tasks may need new columns or indexes: `current` tells, `upgrade` adds them with all "
    "rows kept, `downgrade` goes back before an older version is installed. Needs the extra "
    "\\[migrations].",
)


@app.command()
def current(
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 when an upgrade is needed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show which revision the database is at, and what an upgrade would do. Changes nothing.

    Example: diracx-task-run db current --check
    """
    state = _run(lambda migrations, url: migrations.current(url))
    if as_json:
        echo_json({"database": "TaskDB", **asdict(state)}, indent=2)
    else:
        unstamped = " (recognised by its tables)" if state.revision and not state.stamped else ""
        echo(f"TaskDB is at {state.revision or 'base: it has no tables'}{unstamped}, needed: {state.head}")
        for step in state.pending:
            echo(f"  to do: {step.revision} {step.what}")
    if check and state.pending:
        raise typer.Exit(1)


@app.command()
def upgrade(
    revision: Annotated[str, typer.Argument(metavar="[REVISION]", help="Up to this one.")] = "head",
    as_json: JsonOption = False,
) -> None:
    """Take the database to the newest revision, or to REVISION. All rows are kept; repeating it does no harm.

    An empty database gets its tables. One that was made without a revision, as by `dlq init` of old or by
    `python -m diracx.db init-sql`, is recognised. Several of these at once wait for each other.

    Example: diracx-task-run db upgrade
    """
    _report(_run(lambda migrations, url: migrations.upgrade(url, revision)), as_json)


@app.command()
def downgrade(
    revision: Annotated[str, typer.Argument(metavar="REVISION", help="Down to this one; base: no tables.")],
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Take the database back to REVISION, for an older version of the software. What that does not know is lost.

    Example: diracx-task-run db downgrade 0001 --yes
    """
    what = "drop its tables with all rows" if revision == "base" else f"lose what {revision} does not know"
    confirm(f"Take TaskDB back to {revision}, and {what}?", yes)
    _report(_run(lambda migrations, url: migrations.downgrade(url, revision)), as_json)


def _report(move: Move, as_json: bool) -> None:
    if as_json:
        echo_json({"database": "TaskDB", **asdict(move)}, indent=2)
        return
    if move.recognised:
        echo(f"TaskDB had no version, and was recognised as {move.before}")
    for step in move.steps:
        echo(f"  done: {step.revision} {step.what}")
    echo(f"TaskDB is at {move.after or 'base: it has no tables'}")


def _run(work: Callable[[Migrations, str], Awaitable[_Answer]]) -> _Answer:
    from ...plumbing.persistence import TaskDB

    url = task_db_url()

    async def migrate() -> _Answer:
        return await work(TaskDB.migrations, url)

    with explained_database("TaskDB"):
        return asyncio.run(migrate())
