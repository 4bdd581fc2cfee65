"""Renders the templates of the dashboard, with filters for times, numbers and arguments."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from jinja2 import ChoiceLoader, Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ...operations import as_json, formats
from ...operations.formats import duration
from ...plumbing._util.passwords import last_lines, mask
from ...plumbing._util.printable import printable
from ...plumbing.broker.stored import moment_of
from ..auth.middleware import FORM_FIELD

if TYPE_CHECKING:
    from starlette.requests import Request

HERE = Path(__file__).parent
STATIC = HERE / "static"
#: Maximum length of an argument or message in a table.
_LONGEST = 160


@cache
def environment(*templates: Path) -> Environment:
    """Make the template environment of the dashboard and its extensions, once per process.

    All values are escaped, passwords in URLs are masked, and characters that hide or reorder text are replaced.
    """
    made = Environment(
        loader=ChoiceLoader([FileSystemLoader(path) for path in (HERE / "templates", *templates)]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "age": age,
        "bytes": lambda value: dashed(formats.size(value)),
        "clock": clock,
        "compact": lambda value: short(json.dumps(as_json(value), ensure_ascii=False)),
        "exact": lambda value: escape(mask(str(value))),
        "json": lambda value: json.dumps(as_json(value), indent=2, ensure_ascii=False),
        "dashed": dashed,
        "number": lambda value: dashed(formats.number(value)),
        "percent": lambda value: dashed(formats.percent(value)),
        "seconds": lambda value: dashed(formats.duration(value)),
        "short": short,
        "tail": tail,
        "quoted": lambda text: quote(str(text), safe="", errors="replace"),
    }
    made.globals["static_version"] = _version_of_static()
    return made


def _shown(value: Any) -> Any:
    # Markup was made from such values.
    return printable(mask(value)) if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def _version_of_static() -> str:
    """Return a digest of all static files, for URLs that browsers may cache permanently."""
    digest = hashlib.sha256()
    for file in sorted(STATIC.rglob("*.*")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def text_of(templates: Environment, request: Request, template: str | list[str], context: dict[str, Any]) -> str:
    """Render the first of these templates that exists."""
    root = str(request.scope.get("root_path", ""))
    theme = request.cookies.get("tasks-dashboard-theme", "")
    form_token = getattr(request.state, "form_token", "")
    field = Markup('<input type="hidden" name="{}" value="{}">').format(FORM_FIELD, form_token)
    return templates.select_template([template] if isinstance(template, str) else template).render(
        {
            "root": root,
            "principal": getattr(request.state, "principal", None),
            "form_token": form_token,
            "form_field": field,
            "theme": theme if theme in ("light", "dark") else "",
            # Path of the page, also for its event stream.
            "here": str(request.scope["path"]).removeprefix(root).removeprefix("/live"),
            "now": datetime.now(UTC),
            "query": dict(request.query_params),
            **context,
        }
    )


# --- filters ------------------------------------------------------------------------------------------------


def dashed(text: str) -> str:
    """Replace the text for a missing value by a dash."""
    return "\u2013" if text == formats.NONE else text


def clock(moment: datetime | float | None) -> Markup:
    """Render a time in UTC, with the date unless it is today."""
    if moment is None:
        return Markup("\u2013")
    at = _aware(moment)
    form = "%H:%M:%S" if at.date() == datetime.now(UTC).date() else "%Y-%m-%d %H:%M"
    return _time(at, at.strftime(form))


def age(moment: datetime | float | None) -> Markup:
    """Render the time since a moment, or `in` and the time until it."""
    if moment is None:
        return Markup("\u2013")
    at = _aware(moment)
    past = (datetime.now(UTC) - at).total_seconds()
    if abs(past) < 1:
        return _time(at, "now")
    return _time(at, f"{duration(round(past))} ago" if past > 0 else f"in {duration(round(-past))}")


def _time(at: datetime, text: str) -> Markup:
    exact = at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return Markup('<time datetime="{0}" title="{0}">{1}</time>').format(exact, text.replace(".0 ", " "))


def _aware(moment: datetime | float) -> datetime:
    if isinstance(moment, int | float):
        return moment_of(moment)
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def tail(text: Any, longest: int = 4000) -> str:
    """Truncate a text to its last lines, such as the innermost frames of a traceback."""
    whole = str(text)
    return mask(whole) if len(whole) <= longest else f"… {mask(last_lines(whole, longest))}"


def short(text: Any, longest: int = _LONGEST) -> str:
    """Truncate a text to one line."""
    line = " ".join(mask(str(text), 20 * longest).split())
    return line if len(line) <= longest else line[: longest - 1] + "…"
