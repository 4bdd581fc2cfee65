"""Values of pages with a table: view, rows, filters, facts, buttons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...operations.views import Column, View

#: Style of Rich -> CSS class.
_CLASSES = {"red": "bad", "yellow": "warn", "green": "good", "dim": "muted"}

_NARROW_CHARS = 24
"""A column without longer texts is as narrow as they are."""


class Button(NamedTuple):
    """Button of an action."""

    path: str
    """Path of the action."""
    label: str
    fields: Mapping[str, str]
    """Hidden form fields."""
    id: str
    kind: str = "quiet"
    """CSS class: `quiet`, `danger`."""


class Link(NamedTuple):
    """Link of a filter."""

    text: str
    href: str
    current: bool
    number: int | None = None


class Fact(NamedTuple):
    """Key figure above the table."""

    label: str
    value: str
    href: str = ""
    kind: str = ""
    small: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table, with the parts above and below it on its page."""

    view: View[Any]
    rows: Sequence[Any]
    caption: str = ""
    after: str | None = None
    """Cursor of the next page."""
    actions: Callable[[Any], Sequence[Button]] | None = None
    """Returns the buttons of a row."""
    orders: Mapping[str, str] = field(default_factory=dict)
    """Title of a column -> query parameter `order` that sorts by it."""
    filters: Sequence[Link] = ()
    filters_label: str = ""
    facts: Sequence[Fact] = ()
    notes: Sequence[str] = ()
    """Problems; text in backticks is rendered as code."""
    buttons: Sequence[Button] = ()
    """Buttons below the table."""

    def values(self, **others: Any) -> dict[str, Any]:
        """Return the context of the template `_table.html`, with other values."""
        return {"shown": self, **others}

    def meter(self, column: Column[Any], row: Any) -> tuple[float, float]:
        """Return value and maximum of the bar beside a cell."""
        assert column.meter is not None
        value, maximum = column.meter(row)
        if maximum is None:
            maximum = max(column.meter(each)[0] for each in self.rows)
        return value, maximum or 1

    def classes(self, column: Column[Any], row: Any) -> str:
        """Return the CSS classes of a cell."""
        style = _CLASSES.get(column.style(row), "") if column.style is not None else ""
        if column.right:
            return f"n {style or ('zero' if column.raw(row) == 0 else '')}".strip()
        is_wide = column.longest is not None and len(column.text(row)) > _NARROW_CHARS
        wide = "wide" if is_wide else "" if column.kind == "text" and not column.whole else "nowrap"
        return f"{wide} {style}".strip()
