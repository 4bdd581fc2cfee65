"""Terminal output of all commands: text without control sequences, Rich markup and passwords of URLs; and JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..operations import as_json
from ..operations.masking import masked_json
from ..operations.models import Page
from ..operations.views import View
from ..plumbing._util.passwords import mask
from ..plumbing._util.printable import printable
from .errors import LONGEST_LINE, CliError, UsageProblem, one_line

_Row = TypeVar("_Row")
_WIDTH_WITHOUT_TERMINAL = 220
_LABEL_WIDTH = 11


def echo(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print text, which may have several lines."""
    typer.echo(printable(mask(text)), err=err, nl=nl)


def echo_json(value: Any, *, indent: int | None = None) -> None:
    """Print JSON for scripts."""
    typer.echo(json.dumps(value, indent=indent))


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Print read models as JSON, with passwords of URLs masked."""
    echo_json(masked_json(as_json(value)), indent=indent)


def console() -> Console:
    """Make a console as wide as the terminal, or wide enough for a table where there is none."""
    found = Console()
    return found if found.is_terminal else Console(width=_WIDTH_WITHOUT_TERMINAL)


def styled(text: str, style: str = "") -> Text:
    """Make one line of text with a style."""
    return Text(one_line(text), style=style)


def show(view: View[_Row], rows: Page[_Row] | Sequence[_Row], as_json: bool) -> None:
    """Print read models as JSON or as a table; notes on empty lists and further pages go to stderr."""
    if as_json:
        print_json(rows)
        return
    items, after = (rows.items, rows.after) if isinstance(rows, Page) else (rows, None)
    if items:
        console().print(table(view, items))
    elif after is None:
        echo(view.empty, err=True)
    if after is not None:
        echo(f"there may be more: --limit, or --after '{one_line(after)}'", err=True)


def table(view: View[_Row], rows: Iterable[_Row]) -> Table:
    """Make the table of a view."""
    made = Table(box=None, header_style="bold", pad_edge=False)
    for column in view.columns:
        made.add_column(
            column.title,
            overflow="fold",
            no_wrap=column.whole or column.right,
            justify="right" if column.right else "left",
        )
    for row in rows:
        cells = []
        for number, column in enumerate(view.columns):
            style = "" if column.style is None else column.style(row)
            text = one_line(column.text(row), column.longest or LONGEST_LINE)
            cells.append(Text(text, style=style or ("" if number else "cyan")))
        made.add_row(*cells)
    return made


def report(value: Any, lines: Iterable[str], as_json: bool, *, indent: int | None = None) -> None:
    """Print a result, as JSON or as lines of text."""
    if as_json:
        print_json(value, indent=indent)
    else:
        for line in lines:
            echo(line)


def field_lines(fields: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Format one record: a line per field, `name value`."""
    return (f"{name:<{_LABEL_WIDTH}} {one_line(value)}" for name, value in fields)


def echo_traceback(title: str, traceback: object) -> None:
    """Print a title and a traceback, after an empty line."""
    echo(f"\n{one_line(title)}")
    for line in str(traceback).splitlines():
        echo(f"  {line}")


def confirm(question: str, yes: bool) -> None:
    """Ask for confirmation on the terminal unless `yes`; raise a CliError if it is denied."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageProblem(f"{question} Cannot ask without a terminal; add --yes")
    if not typer.confirm(question, err=True):
        raise CliError("nothing was changed")
