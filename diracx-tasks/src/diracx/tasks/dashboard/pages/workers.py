"""Workers."""

from __future__ import annotations

from typing import Any

from ..page import Installation, Page, Request


async def _load(request: Request, installation: Installation) -> dict[str, Any]:
    snapshot = await installation.snapshot()
    return {
        "workers": snapshot.workers,
        "scheduler_leads": snapshot.scheduler_leads,
        "hosts": len({worker.host for worker in snapshot.workers if worker.alive}),
        "alive": sum(worker.alive for worker in snapshot.workers),
        "slots": sum(worker.slots or 0 for worker in snapshot.workers if worker.alive),
        "slots_used": sum(worker.slots_used or 0 for worker in snapshot.workers if worker.alive),
    }


PAGES = [Page("/workers", "workers", "Workers", _load, section="Now")]
