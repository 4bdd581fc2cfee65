"""Terminal output. All that commands print goes through here: text from outside neither steers the terminal nor is
taken for Rich markup, and no password of a URL is shown. JSON is lossless: it escapes what is not ASCII.
"""

from __future__ import annotations

__all__ = ["console", "echo", "echo_json", "show_table", "styled", "table"]

import json
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import typer

from ..plumbing._util.passwords import mask
from ..plumbing._util.printable import printable
from .errors import one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

_WIDTH_WITHOUT_TERMINAL = 220


def echo(text: str, *, err: bool = False) -> None:
    """Print text, which may have several lines."""
    typer.echo(printable(mask(text)), err=err)


def echo_json(value: Any, *, indent: int | None = None) -> None:
    """Print JSON for scripts."""
    typer.echo(json.dumps(value, indent=indent))


def console() -> Console:
    """A console as wide as the terminal, or wide enough for a table where there is none."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal else Console(width=_WIDTH_WITHOUT_TERMINAL)


def styled(text: str, style: str = "") -> Text:
    """One line of text with a style."""
    from rich.text import Text

    return Text(one_line(text), style=style)


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    *,
    right: Collection[str] = (),
    unbroken: Collection[str] | None = None,
) -> Table:
    """A table, its first column in colour.

    Args:
        right: columns that are aligned to the right, and not broken.
        unbroken: columns that are not broken into lines; the first one where none are named.
    """
    from rich.table import Table

    made = Table(box=None, header_style="bold", pad_edge=False)
    unbroken = columns[:1] if unbroken is None else unbroken
    for column in columns:
        made.add_column(
            column,
            overflow="fold",
            no_wrap=column in unbroken or column in right,
            justify="right" if column in right else "left",
        )
    for first, *others in rows:
        made.add_row(_cell(first, "cyan"), *map(_cell, others))
    return made


def show_table(made: Table, nothing: str) -> None:
    """Print a table, or on stderr that there is nothing."""
    if made.row_count:
        console().print(made)
    else:
        echo(nothing, err=True)


def _cell(value: str | Text, style: str = "") -> Text:
    return styled(value, style) if isinstance(value, str) else styled(value.plain, str(value.style))
