"""The first page: whether all is well, and if not, what to look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ... import monitor
from ...monitor import Point, Snapshot
from ...plumbing.in_force import configurations_in_force
from ..page import Installation, Page, Request

_FAILURES = 6
#: Where there is more about a trouble.
_PATHS = {
    "server": "/",
    "schedules": "/schedules",
    "delayed": "/waiting",
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
    failures = await monitor.failures(redis, limit=_FAILURES)
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
    """The past hour by the minute, and the last minutes as they were seen."""
    points = await installation.history()
    await installation.snapshot()
    return {"throughput": throughput(points), "load": _load(installation)}


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


def _load(installation: Installation) -> dict[str, Any]:
    loads = list(installation.loads)
    return {
        "t": [round(load.at, 1) for load in loads],
        "series": [
            {"label": "waiting", "values": [load.waiting for load in loads]},
            {"label": "running", "values": [load.running for load in loads]},
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
