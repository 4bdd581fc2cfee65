"""The first page: whether all is well, and if not, what to look at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

from ... import monitor
from ...monitor import Point, Snapshot
from ...plumbing.in_force import configurations_in_force
from ..installation import Load
from ..page import Installation, Page, Request, viewer_of

_FAILURES = 6
#: Number of a colour; the third in order would be red, which is for failures.
_VIOLET = 5
#: Where there is more about a trouble.
_PATHS = {
    "server": "/",
    "schedules": "/schedules",
    "delayed": "/delayed",
    "queue": "/queues",
    "workers": "/workers",
    "dead letters": "/dead-letters",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something an operator should know."""

    grave: bool
    text: str
    path: str
    """The page where there is more about it."""
    verbatim: bool = False
    """Whether it begins with a name, which is written as it is."""


async def load(request: Request, installation: Installation) -> dict[str, Any]:
    """What the page shows."""
    redis = installation.redis
    snapshot = await installation.snapshot()
    failures = await viewer_of(request).page(partial(monitor.failures, redis), _FAILURES, None)
    in_force = await configurations_in_force(redis)
    letters = await installation.open_letters()
    points = await installation.history()
    digests = {entry.digest for entry in in_force}
    wrong = [entry for entry in in_force if entry.problems]
    findings = list(_findings(snapshot, letters))
    if wrong:
        findings.append(
            Finding(
                True,
                _count(len(wrong), "process goes", "processes go")
                + " on with an earlier configuration: what is written now is wrong",
                "/configuration",
            )
        )
    elif len(digests) > 1:
        findings.append(Finding(False, f"{len(digests)} different configurations are in force", "/configuration"))
    return {
        "snapshot": snapshot,
        "findings": sorted(findings, key=lambda finding: not finding.grave),
        "failures": failures.items,
        "letters": letters,
        "waiting": sum(queue.backlog for queue in snapshot.queues),
        "running": sum(queue.running for queue in snapshot.queues),
        "slots": sum(worker.slots or 0 for worker in snapshot.workers if worker.alive),
        "slots_used": sum(worker.slots_used or 0 for worker in snapshot.workers if worker.alive),
        "alive": sum(worker.alive for worker in snapshot.workers),
        "done_hour": sum(point.done for point in points),
        "failed_hour": sum(point.failed for point in points),
        "sizes": ("small", "medium", "large"),
        "matrix": {(queue.priority, queue.size): queue for queue in snapshot.queues},
        "priorities": list(dict.fromkeys(queue.priority for queue in snapshot.queues)),
    }


async def charts(request: Request, installation: Installation) -> dict[str, Any]:
    """The past hour by the minute, and what of it was seen."""
    points = await installation.history()
    await installation.snapshot()
    return {"throughput": throughput(points), "load": load_of(points, installation.loads)}


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

    By the minute one knows those that wait and those that run together; apart while somebody was looking.
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


def _findings(snapshot: Snapshot, letters: int | None) -> Iterator[Finding]:
    for trouble in monitor.find_troubles(snapshot):
        path = f"/queues/{trouble.queue}" if trouble.queue else _PATHS[trouble.about]
        yield Finding(trouble.grave, trouble.text, path, verbatim=trouble.queue is not None)
    if letters:
        text = f"{_count(letters, 'dead letter is', 'dead letters are')} to be decided about"
        yield Finding(False, text, "/dead-letters")


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}".replace(",", "\u202f")


PAGES = [Page("/", "overview", "Overview", load, section="Now", charts=charts)]
