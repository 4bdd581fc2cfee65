"""Pages of statistics by task class, and of failed attempts with their tracebacks."""

from __future__ import annotations

from functools import partial
from typing import Any

from .... import operations
from ....operations import TaskStats, Window
from ....operations.views import STATISTICS
from ..page import AppContext, Page, Request, viewer_of
from ..tables import Link, Table

_FAILURES_PAGE = 20
_KEYS = {
    "name": lambda each: each.task_name,
    "done": lambda each: -each.done,
    "failures": lambda each: -(each.failure_rate or 0),
    "slow": lambda each: -(each.run.p95_seconds or 0),
    "queue": lambda each: -(each.queue.p95_seconds or 0),
}
_ORDERS = {"task": "name", "done": "done", "rate": "failures", "run p95": "slow", "queue p95": "queue"}


async def _load(request: Request, context: AppContext) -> dict[str, Any]:
    window: Window = "day" if request.query_params.get("window") == "day" else "hour"
    order = request.query_params.get("order", "name")
    order = order if order in _KEYS else "name"
    found: list[TaskStats] = await operations.stats(context.redis, window)
    return Table(
        filters=[
            Link(text, f"/tasks?window={name}&order={order}", window == name)
            for name, text in (("hour", "Past hour"), ("day", "Past day"))
        ],
        filters_label="Time",
        view=STATISTICS,
        rows=sorted(found, key=_KEYS[order]),
        caption="Percentiles are at most 19 % too high.",
        orders=_ORDERS,
    ).values()


async def _failures(request: Request, context: AppContext) -> dict[str, Any]:
    task = request.query_params.get("task") or None
    read = partial(operations.failures, context.redis, task_name=task)
    page = await viewer_of(request).page(read, _FAILURES_PAGE, request.query_params.get("after"))
    return {"page": page, "task": task}


PAGES = [
    Page("/tasks", "tasks", "Task classes", _load, section="Monitoring", per_vo=True),
    Page("/failures", "failures", "Failures", _failures, section="Problems", per_vo=True),
]
