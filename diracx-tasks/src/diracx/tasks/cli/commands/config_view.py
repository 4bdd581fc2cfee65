"""How settings look: as tables, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..output import show_table, styled, table

if TYPE_CHECKING:
    from rich.text import Text

    from ...plumbing.config import Problem, Source


def problem_record(problem: Problem, source: Source) -> dict[str, Any]:
    """A problem as `config check --json` has it."""
    return {
        "path": ".".join(problem.path),
        "line": source.line(problem.path),
        "message": problem.message,
        "prevents_start": not problem.foreign,
    }


def print_settings(
    source: Source, tasks: Sequence[Mapping[str, Any]], limits: Sequence[Mapping[str, Any]]
) -> None:
    """For reading: a block for each task and VO, and one for the limits of objects."""
    rows: list[tuple[str | Text, ...]] = []

    def add(title: str, settings: Mapping[str, Any]) -> None:
        for number, (name, setting) in enumerate(settings.items()):
            written = setting["from"] != "code"
            rows.append(
                (
                    "" if number else title,
                    name,
                    styled(_shown(setting["value"]), "bold" if written else ""),
                    styled(_origin(setting, source)) if written else styled("code", "dim"),
                )
            )

    for record in tasks:
        of_vo = f" for {record['vo']}" if record["vo"] is not None else ""
        add(f"{record['task']}{of_vo}", record["settings"])
        for key, settings in record["instances"].items():
            add(f"{record['task']}@{key}{of_vo}", settings)
    for record in limits:
        of_vo = f" for {record['vo']}" if record["vo"] is not None else ""
        of_key = record["object"] if record["key"] is None else f"{record['object']} {record['key']}"
        add(f"limits of {of_key}{of_vo}", record["settings"])
    columns = ("task", "setting", "value", "from")
    show_table(table(columns, rows, unbroken=()), "no tasks are installed; load a file's with --module")


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value, default=str) if isinstance(value, dict | list) else str(value)


def _origin(setting: Mapping[str, Any], source: Source) -> str:
    at = source.name if setting["line"] is None else f"{source.name}:{setting['line']}"
    return f"{setting['from']}, {at}" if at else setting["from"]
