"""The first page: whether all is well, and if not, what to look at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any

from redis.exceptions import RedisError

from .... import operations
from ....operations import Point
from ....operations.health.alerts import worst
from ....operations.health.runner import DEAD_LETTERS, unreadable
from ....plumbing.broker.stored import UnreadableKeyError
from ...context import Load
from ..page import AppContext, Page, Request, viewer_of

_FAILURES = 6
#: Number of a colour; the third in order would be red, which is for failures.
_VIOLET = 5


async def load(request: Request, context: AppContext) -> dict[str, Any]:
    """Load the values of the page that can be had: the alerts say which cannot."""
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
        alerts = sorted([unreadable(error), *others], key=lambda alert: -alert.severity.rank)
        return shown | {"health": replace(health, alerts=alerts, severity=worst(alerts))}
    dead_letters = [alert.count for alert in whole.alerts if alert.check == "dead_letters_open"]
    away = context.task_db is None or any(alert.subject == DEAD_LETTERS for alert in whole.alerts)
    return shown | {
        "snapshot": snapshot,
        "failures": failures.items,
        "dead_letters": None if away else sum(dead_letters),
        "no_letters": "no database here" if context.task_db is None else "database away",
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
    """The past hour by the minute, and what of it was seen."""
    try:
        points = await context.history()
        await context.snapshot()
    except (RedisError, OSError, UnreadableKeyError):
        return {"throughput": {"t": [], "series": []}, "load": {"t": [], "series": []}}
    return {"throughput": throughput(points), "load": load_of(points, context.loads)}


def throughput(points: list[Point]) -> dict[str, Any]:
    """Tasks per minute, for a chart. The present minute is not over: it would look like a breakdown."""
    points = points[:-1]
    return {
        "t": [int(point.at.timestamp()) for point in points],
        "series": [
            {"label": "submitted", "values": [point.submitted for point in points]},
            {"label": "done", "values": [point.done for point in points]},
            {"label": "failed", "values": [point.failed for point in points]},
        ],
    }


def load_of(points: Sequence[Point], looks: Iterable[Load]) -> dict[str, Any]:
    """Tasks in the queues, for a chart of the past hour.

    By the minute one knows those that wait and those that run together; apart while a page was open.
    """
    begin = points[0].at.timestamp()
    seen = [look for look in looks if look.at >= begin]
    minutes = {look.at // 60 for look in seen}
    rows: list[tuple[float, int | None, int | None, int]] = [
        (round(look.at, 1), look.waiting, look.running, look.waiting + look.running) for look in seen
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


PAGES = [Page("/", "overview", "Overview", load, section="Now", charts=charts)]
