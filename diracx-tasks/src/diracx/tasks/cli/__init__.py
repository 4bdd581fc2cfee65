"""The command line `diracx-task-run`, also installed as `diracx-tasks`."""

from __future__ import annotations

from typing import Annotated

import typer

from .commands.call import call
from .commands.cancel import cancel
from .commands.config import app as config
from .commands.dashboard import dashboard
from .commands.db import app as db
from .commands.dev import dev
from .commands.dlq import app as dlq
from .commands.group import app as group
from .commands.inspect import audit, list_tasks, running, task_statistics, workers
from .commands.locks import app as locks
from .commands.queue import app as queue
from .commands.schedule import app as schedule
from .commands.serve import scheduler, worker
from .commands.status import status
from .commands.submit import submit
from .options import Commands
from .program import run_program

__all__ = ["app", "main"]

app = Commands(
    name="diracx-task-run",
    help="Run DiracX tasks.\n\n"
    "A first task, from a plain file, with everything it needs in one terminal:\n\n"
    "    diracx-task-run dev --module my_tasks.py\n\n"
    "    diracx-task-run submit my_tasks:Greet --args '\\[\"world\"]' --wait --module my_tasks.py",
    epilog="Every command explains itself: diracx-task-run COMMAND --help",
    add_completion=False,
    # Typer's own tracebacks show local variables, and those hold passwords.
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (call, submit, cancel, worker, scheduler, dev, status, workers, running, dashboard, audit):
    app.command(_command.__name__)(_command)
app.command("list")(list_tasks)
for _group in (dlq, db, group, config, schedule, queue, locks, task_statistics):
    app.add_typer(_group)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"diracx-tasks {version('diracx-tasks')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


def main() -> None:
    """The command line. Exits with 0, with 2 when the command line is wrong, and with 1 for all the rest."""
    run_program(app)
