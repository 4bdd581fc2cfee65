"""How each class of tasks did."""

from __future__ import annotations

from typing import Any

from .... import operations as monitor
from ....operations import TaskStats, Window
from ..page import AppContext, Page, Request

_KEYS = {
    "name": lambda each: each.task_name,
    "done": lambda each: -each.done,
    "failures": lambda each: -(each.failure_rate or 0),
    "slow": lambda each: -(each.run.p95_seconds or 0),
    "queue": lambda each: -(each.queue.p95_seconds or 0),
}


async def _load(request: Request, context: AppContext) -> dict[str, Any]:
    window: Window = "day" if request.query_params.get("window") == "day" else "hour"
    order = request.query_params.get("order", "name")
    found: list[TaskStats] = await monitor.stats(context.redis, window)
    key = _KEYS.get(order, _KEYS["name"])
    return {
        "stats": sorted(found, key=key),
        "window": window,
        "order": order if order in _KEYS else "name",
    }


PAGES = [Page("/tasks", "tasks", "Task classes", _load, section="Now")]
