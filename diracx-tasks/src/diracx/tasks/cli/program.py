"""Runs a command line, and reports its errors in one line each."""

from __future__ import annotations

import sys
import threading
import traceback
from typing import Any

import typer

from ..plumbing._util.passwords import mask
from ..plumbing._util.printable import printable
from .errors import CliError, one_line
from .options import Commands

#: Typer brings a copy of click with it; this is its `click.UsageError`, by a public name.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def run_program(app: Commands, prefix: str = "error") -> None:
    """Run a command line. Exits with 0, with 2 when the command line is wrong, and with 1 for all the rest.

    Args:
        prefix: what the line of an error begins with.
    """
    threading.excepthook = _report_unless_late
    try:
        code = app(standalone_mode=False)
    except CliError as error:
        code = error.exit_code
        if error.detail:
            _print(error.detail)
        for line in error.lines:
            typer.secho(f"{prefix}: {one_line(line)}", fg="red", err=True)
    except _UsageError as error:
        code = 2
        if problem := _usage_problem(error):
            typer.secho(f"{prefix}: {one_line(problem)}", fg="red", err=True)
    except (BrokenPipeError, typer.Abort):  # as in `… | head`; Ctrl-C
        code = 1
    except Exception:
        # A bug of ours: its report needs the traceback, without passwords.
        code = 1
        _print(traceback.format_exc())
    sys.exit(code if isinstance(code, int) else 0)


def _print(text: str) -> None:
    typer.echo(printable(mask(text.rstrip("\n"))), err=True)


def _report_unless_late(error: threading.ExceptHookArgs) -> None:
    """Report an error of a thread, but for one of aiosqlite that ends after the event loop of a failed command."""
    if str(error.exc_value) != "Event loop is closed":
        threading.__excepthook__(error)


def _usage_problem(error: Any) -> str:
    """Message of a usage error of Typer, with the value, which it does not always name, and where to read on.

    Nothing where no command of a group was named: Typer has shown its help.
    """
    problem = error.format_message().replace("Value error, ", "").rstrip(".?")
    if not problem:
        return ""
    found: list[Any] = getattr(error.__cause__, "errors", list)()  # pydantic's, from which it made its message
    value = repr(found[0]["input"]) if found else ""
    if value not in problem:
        problem += f", not {value}"
    where = error.ctx.command_path if error.ctx else "this command"
    return f"{problem}; see `{where} --help`"
