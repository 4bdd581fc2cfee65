"""Page of the active configuration of each process, and of all settings."""

from __future__ import annotations

from typing import Any

from ....operations.settings import limit_records, task_records
from ....plumbing.config.active import ActiveConfig, active_configs
from ..page import AppContext, Page, Request

#: Maximum number of tasks whose settings are on one page.
_UNFOLDED = 20


async def _load(request: Request, context: AppContext) -> dict[str, Any]:
    entries = await active_configs(context.redis)
    settings = await context.settings()
    chosen = request.query_params.get("task", "")
    tasks = [
        record
        for name in sorted(context.registry)
        if not chosen or name == chosen
        for record in task_records(settings.tasks, name, context.registry[name], None)
    ]
    return {
        "entries": entries,
        "digests": sorted({entry.digest for entry in entries}),
        "lines": _lines(entries),
        "source": context.reader.source,
        "problems": settings.problems,
        "tasks": [record | {"rows": list(_rows(record))} for record in tasks],
        "limits": limit_records(settings.tasks, None),
        "names": sorted(context.registry),
        "chosen": chosen,
        "unfolded": len(tasks) <= _UNFOLDED,
    }


def _rows(record: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Return instance, name and record of each setting."""
    rows = [("", name, setting) for name, setting in record["settings"].items()]
    for key, settings in record["instances"].items():
        rows += [(key, name, setting) for name, setting in settings.items()]
    return rows


def _lines(entries: list[ActiveConfig]) -> list[tuple[str, str, int]]:
    """Return kind, text and number of processes of each problem and warning, without duplicates."""
    found: dict[tuple[str, str], int] = {}
    for entry in entries:
        for kind, lines in (("bad", entry.problems), ("warn", entry.warnings)):
            for line in lines:
                found[kind, line] = found.get((kind, line), 0) + 1
    return [(kind, line, number) for (kind, line), number in found.items()]


PAGES = [Page("/configuration", "configuration", "Configuration", _load, section="Control", live=False)]
