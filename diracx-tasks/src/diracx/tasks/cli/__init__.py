"""The command line `diracx-task-run`, also installed as `diracx-tasks`."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version
from typing import Annotated

import typer

from .options import Commands
from .program import run_program

__all__ = ["application", "main"]

#: Command or command group -> its function or `Commands` below `commands`, and its line in the list of commands.
_COMMANDS = {
    "call": ("call:call", "Run a task in this process and print what it returns."),
    "submit": ("call:submit", "Submit a task to the queue of its priority and size, and print its id."),
    "cancel": ("queue:cancel", "Cancel tasks: queued, delayed, retrying, waiting for a lock, or running."),
    "worker": ("serve:worker", "Run tasks of one size until SIGTERM or Ctrl-C."),
    "scheduler": ("serve:scheduler", "Submit periodic tasks when they are due. Any number may run; one leads."),
    "dev": ("dev:dev", "Run an embedded Valkey, the scheduler and one worker per size in this terminal."),
    "status": ("status:status", "Show alerts, queues, workers and delayed tasks."),
    "workers": ("inspect:workers", "List the workers: size, slots in use, state, last report, memory."),
    "running": ("inspect:running", "List the running tasks, longest first."),
    "dashboard": ("dashboard:dashboard", "Serve the dashboard, which shows the system and can change it."),
    "audit": ("inspect:audit", "List audited actions, newest first."),
    "list": ("inspect:list_tasks", "List the task classes that are installed or in a --module."),
    "dlq": ("dlq:app", "Inspect dead letters, submit them again, or discard them."),
    "db": ("db:app", "Migrate the database of dead letters."),
    "group": ("inspect:groups", "Inspect pending callback groups."),
    "config": ("config:app", "Check and show the task configuration."),
    "schedule": ("schedule:app", "Inspect, run, pause and resume the schedules of periodic tasks."),
    "queue": ("queue:app", "Inspect the nine queues and the delayed tasks; purge a queue."),
    "locks": ("locks:app", "Inspect locks and limiters; release a lock."),
    "tasks": ("inspect:task_statistics", "Show statistics of task classes."),
}


def application(only: str | None = None) -> Commands:
    """Make the command line. If `only` is given, import the module of that command alone."""
    app = Commands(
        name="diracx-task-run",
        help="Run DiracX tasks.\n\n"
        "Run a first task from a plain file, with server, scheduler and workers in one terminal:\n\n"
        "    diracx-task-run dev --module my_tasks.py\n\n"
        "    diracx-task-run submit my_tasks:Greet --args '\\[\"world\"]' --wait --module my_tasks.py",
        epilog="Help on a command: diracx-task-run COMMAND --help",
        add_completion=False,
        # Typer's tracebacks show local variables, which may hold passwords.
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name, (path, summary) in _COMMANDS.items():
        module, _, attribute = path.partition(":")
        if only not in (None, name):
            app.command(name, help=summary)(_root)  # for the list of commands
            continue
        command = getattr(import_module(f".commands.{module}", __name__), attribute)
        if isinstance(command, Commands):
            app.add_typer(command, name=name, short_help=summary)
        else:
            app.command(name, short_help=summary)(command)
    return app


def _version(show: bool) -> None:
    if show:
        typer.echo(f"diracx-tasks {version('diracx-tasks')}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line. Exits with 0, with 2 after a usage error, and with 1 after any other error."""
    run_program(lambda: application(only=next(iter(sys.argv[1:]), "")))
