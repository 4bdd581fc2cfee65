"""Terminal output of all commands: text without control sequences, Rich markup and passwords of URLs; and JSON."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..operations import as_json
from ..operations.masking import masked_json
from ..operations.models import Page
from ..operations.views import Column, View
from ..plumbing._util.passwords import mask
from ..plumbing._util.printable import printable
from .errors import LONGEST_LINE, CliError, UsageProblem, one_line

_Row = TypeVar("_Row")
_WIDTH_WITHOUT_TERMINAL = 220
_LABEL_WIDTH = 11
#: A column that may wrap is not narrower, unless all its texts are shorter.
_LEGIBLE_WIDTH = 12
_GAP = 2


def echo(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print text, which may have several lines."""
    _write(printable(mask(text)), err=err, nl=nl)


def echo_json(value: Any, *, indent: int | None = None) -> None:
    """Print JSON for scripts."""
    _write(json.dumps(value, indent=indent))


def _write(text: str, *, err: bool = False, nl: bool = True) -> None:
    try:
        typer.echo(text, err=err, nl=nl)
    except OSError as error:
        error.add_note(text)  # names what was done
        raise


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
        terminal = console()
        terminal.print(table(view, items, terminal.width))
    elif after is None:
        echo(view.empty, err=True)
    if after is not None:
        echo(f"there may be more: --limit, or --after {shlex.quote(one_line(after))}", err=True)


def table(view: View[_Row], rows: Iterable[_Row], width: int) -> Table:
    """Make the table of a view. If it would not be legible within `width`, a line per value is shown instead."""
    cells = [
        [_cell(column, row, "" if number else "cyan") for number, column in enumerate(view.columns)]
        for row in rows
    ]
    whole = [column.whole or column.right or column.kind == "id" for column in view.columns]
    needed = 0
    for column, is_whole, *texts in zip(view.columns, whole, *cells, strict=True):
        longest = max([cell_len(column.title), *(text.cell_len for text in texts)])
        needed += _GAP + (longest if is_whole else min(longest, _LEGIBLE_WIDTH))
    if needed - _GAP > width:
        return _records(view, cells)
    made = Table(box=None, header_style="bold", pad_edge=False)
    for column, is_whole in zip(view.columns, whole, strict=True):
        made.add_column(
            column.title, overflow="fold", no_wrap=is_whole, justify="right" if column.right else "left"
        )
    for row in cells:
        made.add_row(*row)
    return made


def _records(view: View[_Row], rows: Iterable[Sequence[Text]]) -> Table:
    made = Table(box=None, show_header=False, pad_edge=False)
    made.add_column(style="bold", overflow="fold")
    made.add_column(overflow="fold")
    for row in rows:
        if made.row_count:
            made.add_row()
        for column, text in zip(view.columns, row, strict=True):
            made.add_row(column.title, text)
    return made


def _cell(column: Column[_Row], row: _Row, style: str) -> Text:
    text = one_line(column.text(row), column.longest or LONGEST_LINE)
    return Text(text, style=(column.style(row) if column.style else "") or style)


def report(value: Any, lines: Iterable[str], as_json: bool, *, indent: int | None = None) -> None:
    """Print a result, as JSON or as lines of text."""
    if as_json:
        print_json(value, indent=indent)
    elif text := "\n".join(lines):
        echo(text)


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
