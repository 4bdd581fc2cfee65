"""Tables on terminals of any width."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from diracx.tasks.cli.output import table
from diracx.tasks.operations import views
from rich.console import Console

_VIEWS = {name: view for name, view in vars(views).items() if isinstance(view, views.View)}


@pytest.mark.parametrize("width", [40, 60, 80, 100, 132, 160, 220])
@pytest.mark.parametrize("name", _VIEWS)
def test_no_column_is_lost_and_no_number_or_id_is_cut_on_a_narrow_terminal(name: str, width: int) -> None:
    columns: list[views.Column[Any]] = [
        replace(column, value=partial(lambda number, row: row[number], number), form=str, style=None, longest=None)
        for number, column in enumerate(_VIEWS[name].columns)
    ]
    rows = [[f"{row}-{number}-xxxxxxxxxxxx" for number in range(len(columns))] for row in range(3)]
    console = Console(width=width)
    with console.capture() as captured:
        console.print(table(views.View("none", tuple(columns)), rows, width))
    for row in rows:
        for column, value in zip(columns, row, strict=True):
            whole = column.right or column.whole or column.kind == "id"
            assert (value if whole else value[:4]) in captured.get()
