"""Page of the workers."""

from __future__ import annotations

from typing import Any

from ....operations.formats import number
from ....operations.views import WORKERS
from ..page import AppContext, Page, Request, viewer_of
from ..tables import Fact, Table

#: Maximum number of listed workers; dead ones come first.
_MOST = 150


async def _load(request: Request, context: AppContext) -> dict[str, Any]:
    snapshot = await context.snapshot()
    workers = sorted(viewer_of(request).workers(snapshot.workers), key=lambda worker: worker.alive)
    alive = [worker for worker in workers if worker.alive]
    hosts = len({worker.host for worker in alive})
    slots, used = (sum(getattr(each, name) or 0 for each in alive) for name in ("slots", "slots_used"))
    hidden = max(0, len(workers) - _MOST)
    return Table(
        facts=[
            Fact("Alive", number(len(alive)), small=f"on {hosts} host{'' if hosts == 1 else 's'}"),
            Fact("Slots used", number(used), "/running", small=f"of {number(slots)}"),
            Fact("Scheduler", "leads" if snapshot.scheduler_leads else "none leads", "/schedules"),
        ],
        view=WORKERS,
        rows=workers[:_MOST],
        caption=f"{_MOST} workers; `diracx-task-run workers` lists {number(hidden)} more." if hidden else "",
    ).values()


PAGES = [Page("/workers", "workers", "Workers", _load, section="Monitoring", per_vo=True)]
