"""Values of the pages with a table: its view and rows, and the controls around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...operations.views import Column, View

#: Styles of terminals -> classes of the style sheet.
_CLASSES = {"red": "bad", "yellow": "warn", "green": "good", "dim": "muted"}


class Button(NamedTuple):
    """A button that asks a question first."""

    path: str
    """Of the action."""
    label: str
    fields: Mapping[str, str]
    """Values that the form sends."""
    id: str
    kind: str = "quiet"
    """Class: `quiet`, `danger`."""


class Link(NamedTuple):
    """One choice of a filter."""

    text: str
    href: str
    current: bool
    number: int | None = None


class Fact(NamedTuple):
    """A figure above the table."""

    label: str
    value: str
    href: str = ""
    kind: str = ""
    small: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of a view on a page."""

    view: View[Any]
    rows: Sequence[Any]
    caption: str = ""
    empty: str = ""
    """Text that is shown without rows; by default the words of the view."""
    after: str | None = None
    """Cursor of the next page."""
    actions: Callable[[Any], Sequence[Button]] | None = None
    """The buttons of a row."""
    orders: Mapping[str, str] = field(default_factory=dict)
    """Title of a column -> `order` of the query that sorts by it."""

    def meter(self, column: Column[Any], row: Any) -> tuple[float, float]:
        """Return value and maximum of the bar beside a cell."""
        assert column.meter is not None
        value, maximum = column.meter(row)
        if maximum is None:
            maximum = max(column.meter(each)[0] for each in self.rows)
        return value, maximum or 1

    def classes(self, column: Column[Any], row: Any) -> str:
        """Return the classes of a cell."""
        style = _CLASSES.get(column.style(row), "") if column.style is not None else ""
        if column.right:
            zero = column.kind == "number" and not column.raw(row)
            return f"n {style or ('zero' if zero else '')}".strip()
        wide = (
            "wide"
            if column.longest is not None
            else ""
            if column.kind == "text" and not column.whole
            else "nowrap"
        )
        return f"{wide} {style}".strip()


@dataclass(frozen=True, kw_only=True)
class TablePage:
    """A page that is a table, and little else. `values` are what its template shows."""

    table: Table
    filters: Sequence[Link] = ()
    filters_label: str = ""
    facts: Sequence[Fact] = ()
    notes: Sequence[str] = ()
    """Problems; words in `…` are code."""
    buttons: Sequence[Button] = ()
    """Below the table."""
    heading: tuple[str, str] | None = None
    """Path and title of the page above this one; the heading is a path then."""

    def values(self) -> dict[str, Any]:
        """Return what the template `_table.html` shows."""
        return {"shown": self, "parent": self.heading}
