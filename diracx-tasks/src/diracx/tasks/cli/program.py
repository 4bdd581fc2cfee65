"""Runs a command line and reports its errors in one line each."""

from __future__ import annotations

import errno
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import typer

from ..plumbing._util.passwords import mask
from ..plumbing._util.printable import printable
from ..plumbing.exceptions import TaskConfigError
from ..plumbing.task_names import AmbiguousTaskNameError
from .errors import CliError, UsageProblem, one_line
from .options import Commands

#: `click.UsageError` of the copy of click inside Typer, by a public name.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
#: Errors of an output on a full or broken disk, beyond a quota or a limit of the size of files.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def run_program(load: Callable[[], Commands], prefix: str = "error") -> None:
    """Load and run a command line. Exits with 0, with 2 after a usage error, and with 1 after any other error."""
    threading.excepthook = _report_unless_late
    try:
        code = load()(standalone_mode=False)
    except CliError as error:
        code = _report(error, prefix)
    except TaskConfigError as error:
        code = _report(CliError(str(error)), prefix)
    except AmbiguousTaskNameError as error:
        code = _report(UsageProblem(str(error)), prefix)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # raised by a command group without a command
            typer.echo(str(error))
            code = 2
        else:
            code = _report(UsageProblem(_usage_problem(error)), prefix)
    except (BrokenPipeError, KeyboardInterrupt, typer.Abort):  # as in `… | head`; Ctrl-C
        code = 1
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FULL and error.filename is None:
            unwritten = "; it is: ".join([str(error.strerror), *getattr(error, "__notes__", ())])
            code = _report(CliError(f"cannot write the output: {unwritten}"), prefix)
        else:
            code = 1  # a bug: its report needs the traceback
            _print(traceback.format_exc())
    try:
        print(end="", flush=True)
    except OSError:  # reported already; Python would try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code if isinstance(code, int) else 0)


def _report(error: CliError, prefix: str) -> int:
    """Print an error, and return the exit code."""
    if error.detail:
        _print(error.detail)
    for line in error.lines:
        typer.secho(f"{prefix}: {one_line(line)}", fg="red", err=True)
    return error.exit_code


def _print(text: str) -> None:
    typer.echo(printable(mask(text.rstrip("\n"))), err=True)


def _report_unless_late(error: threading.ExceptHookArgs) -> None:
    """Report the error of a thread, except that of an aiosqlite thread that outlives the event loop."""
    if str(error.exc_value) != "Event loop is closed":
        threading.__excepthook__(error)


def _usage_problem(error: Any) -> str:
    """Format a usage error of Typer with the value, which Typer does not always name, and a hint to --help."""
    problem = error.format_message().replace("Value error, ", "").replace(". Did you", "; did you").rstrip(".")
    found: list[Any] = getattr(error.__cause__, "errors", list)()  # pydantic's, from which it made its message
    value = repr(found[0]["input"]) if found else ""
    if value not in problem:
        problem += f", not {value}"
    where = error.ctx.command_path if error.ctx else "this command"
    return f"{problem}{' See' if problem.endswith('?') else '; see'} `{where} --help`"
