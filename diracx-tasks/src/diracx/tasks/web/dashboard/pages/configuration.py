"""Page of the active configuration of each process, and of all settings."""

from __future__ import annotations

from typing import Any

from ....operations.settings import limit_records, task_records
from ....operations.views import ACTIVE_CONFIGS
from ....plumbing.config.active import active_configs, notes_of
from ..page import AppContext, Page, Request
from ..tables import Table

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
    different = len({entry.digest for entry in entries})
    same = "All processes use the same settings."
    caption = same if different == 1 else f"{different} different settings are in force."
    return {
        "in_force": Table(view=ACTIVE_CONFIGS, rows=entries, caption=caption),
        "notes": list(notes_of(entries)),
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


PAGES = [Page("/configuration", "configuration", "Configuration", _load, section="Control", live=False)]
