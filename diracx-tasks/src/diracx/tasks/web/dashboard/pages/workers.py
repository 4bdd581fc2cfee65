"""Workers."""

from __future__ import annotations

from typing import Any

from ..page import AppContext, Page, Request, viewer_of

#: A page has no more; the lost ones come first.
_MOST = 150


async def _load(request: Request, context: AppContext) -> dict[str, Any]:
    snapshot = await context.snapshot()
    return {
        "workers": sorted(viewer_of(request).workers(snapshot.workers), key=lambda worker: worker.alive)[:_MOST],
        "hidden": max(0, len(snapshot.workers) - _MOST),
        "scheduler_leads": snapshot.scheduler_leads,
        "hosts": len({worker.host for worker in snapshot.workers if worker.alive}),
        "alive": sum(worker.alive for worker in snapshot.workers),
        "slots": sum(worker.slots or 0 for worker in snapshot.workers if worker.alive),
        "slots_used": sum(worker.slots_used or 0 for worker in snapshot.workers if worker.alive),
    }


PAGES = [Page("/workers", "workers", "Workers", _load, section="Now")]
