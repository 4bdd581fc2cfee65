"""Overview page: alerts, key figures, queues, last failures, charts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any

from redis.exceptions import RedisError

from .... import operations
from ....operations import Point
from ....operations.health.runner import DEAD_LETTERS, unreadable
from ....plumbing.broker.stored import UnreadableKeyError
from ...context import Load
from ..page import AppContext, Page, Request, viewer_of

_FAILURES = 6
#: Number of the colour for `both`; that of the third series is used for failures.
_VIOLET = 5


async def load(request: Request, context: AppContext) -> dict[str, Any]:
    """Load the values of the page, only the alerts if the server does not respond."""
    viewer, whole = viewer_of(request), await context.health()
    health = whole.for_viewer(viewer)
    shown: dict[str, Any] = {"health": health, "snapshot": None, "sizes": ("small", "medium", "large")}
    try:
        snapshot = await context.snapshot()
        points = await context.history()
        failures = await viewer.page(partial(operations.failures, context.redis), _FAILURES, None)
    except (RedisError, OSError):
        return shown
    except UnreadableKeyError as error:
        others = (alert for alert in health.alerts if alert.check != "server_unreadable")
        return shown | {"health": replace(health, alerts=[unreadable(error), *others])}
    dead_letters = [alert.count for alert in whole.alerts if alert.check == "dead_letters_open"]
    unavailable = context.task_db is None or any(alert.subject == DEAD_LETTERS for alert in whole.alerts)
    return shown | {
        "snapshot": snapshot,
        "failures": failures.items,
        "dead_letters": None if unavailable else sum(dead_letters),
        "no_dead_letters": "no database" if context.task_db is None else "database unavailable",
        "waiting": sum(queue.backlog for queue in snapshot.queues),
        "running": sum(queue.running for queue in snapshot.queues),
        "slots": sum(worker.slots or 0 for worker in snapshot.workers if worker.alive),
        "slots_used": sum(worker.slots_used or 0 for worker in snapshot.workers if worker.alive),
        "alive": sum(worker.alive for worker in snapshot.workers),
        "done_hour": sum(point.done for point in points),
        "failed_hour": sum(point.failed for point in points),
        "matrix": {(queue.priority, queue.size): queue for queue in snapshot.queues},
        "priorities": list(dict.fromkeys(queue.priority for queue in snapshot.queues)),
    }


async def charts(request: Request, context: AppContext) -> dict[str, Any]:
    """Load the charts of the past hour."""
    try:
        points = await context.history()
        await context.snapshot()
    except (RedisError, OSError, UnreadableKeyError):
        return {"throughput": {"t": [], "series": []}, "load": {"t": [], "series": []}}
    return {"throughput": throughput(points), "load": load_of(points, context.loads)}


def throughput(points: list[Point]) -> dict[str, Any]:
    """Make the chart of tasks per minute, without the current minute, which is not complete."""
    points = points[:-1]
    return {
        "t": [int(point.at.timestamp()) for point in points],
        "series": [
            {"label": "submitted", "values": [point.submitted for point in points]},
            {"label": "done", "values": [point.done for point in points]},
            {"label": "failed", "values": [point.failed for point in points]},
        ],
    }


def load_of(points: Sequence[Point], loads: Iterable[Load]) -> dict[str, Any]:
    """Make the chart of waiting and running tasks.

    `points` has their sum for each minute; `loads` has both, for the times at which a page was open.
    """
    begin = points[0].at.timestamp()
    recent = [load for load in loads if load.at >= begin]
    minutes = {load.at // 60 for load in recent}
    rows: list[tuple[float, int | None, int | None, int]] = [
        (round(load.at, 1), load.waiting, load.running, load.waiting + load.running) for load in recent
    ]
    rows += [
        (at, None, None, point.backlog)
        for point in points
        if point.backlog is not None and (at := point.at.timestamp()) // 60 not in minutes
    ]
    rows.sort(key=itemgetter(0))
    return {
        "t": [row[0] for row in rows],
        "series": [
            {"label": label, "values": [row[column] for row in rows], "colour": colour}
            for column, label, colour in ((1, "waiting", 1), (2, "running", 2), (3, "both", _VIOLET))
        ],
    }


PAGES = [Page("/", "overview", "Overview", load, section="Monitoring", charts=charts, per_vo=True)]
