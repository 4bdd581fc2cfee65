"""Recovery times of tasks after the failure of their worker, by case."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from . import executions as by
from . import tasks
from .drive import Observed
from .executions import START_UNSEEN_SECONDS, Executions
from .records import Run

#: Kinds that wait for nothing but a worker.
_WITHOUT_LOCKS = ("Quick", "Urgent", "Slow", "Child")
#: Each death costs a lease, and poison candidates run one after another.
BESIDE_POISON = "worker killed by a poison task"
_CASES = {
    by.KILLED: "worker killed",
    by.BESIDE_POISON: BESIDE_POISON,
    by.PAUSED: "worker paused",
    by.DISCONNECTED: "worker disconnected",
}
_SERVER_UNAVAILABLE = "server unavailable"
#: A worker must outlive the outage by so much to tell how long it took.
_ALIVE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Waits:
    """Seconds from the disturbance to the next execution; of the server: from its return to the next one by a
    worker that has outlived the outage.
    """

    p50: float
    p99: float
    max: float
    number: int
    p50_up: float
    """Median of their parts in which a worker was up that could have begun the execution."""

    def __str__(self) -> str:
        return f"{self.p50:g} / {self.p99:g} / {self.max:g}"


def recovery(
    executions: Executions, observed: Observed, runs_of_tasks: Iterable[list[Run]], runs: list[Run]
) -> dict[str, Waits]:
    """Case -> how long tasks waited; cases that did not happen are left out."""
    waits: dict[str, list[tuple[float, float]]] = defaultdict(list)
    up = _up(executions, observed, runs)
    for tries in runs_of_tasks:
        for run, following in pairwise(tries):
            disturbance = executions.first_disturbance(run)
            if run.kind not in _WITHOUT_LOCKS or disturbance is None or disturbance[1] not in _CASES:
                continue
            begin, end = disturbance[0], following.start
            if end > begin:
                waits[_CASES[disturbance[1]]].append((end - begin, _covered(up[_size(run)], begin, end)))
    for outage in observed.outages:
        lived = {
            run.pid
            for run in runs
            if run.start < outage.begin
            and executions.process_ends.get(run.pid, math.inf) > outage.end + _ALIVE_SECONDS
        }
        first = min((run.start for run in runs if run.pid in lived and run.start > outage.end), default=None)
        if first is not None:
            waits[_SERVER_UNAVAILABLE].append((first - outage.end, first - outage.end))
    return {case: _summary(waits[case]) for case in (*_CASES.values(), _SERVER_UNAVAILABLE) if case in waits}


def _size(run: Run) -> str:
    return str(getattr(tasks, run.kind).size)


def _up(executions: Executions, observed: Observed, runs: list[Run]) -> dict[str, list[tuple[float, float]]]:
    """Size -> times in which one of its workers was up: it had begun its first execution, or had had
    `START_UNSEEN_SECONDS` for that, and was neither paused nor asked to stop.
    """
    history = observed.history
    first: dict[int, float] = {}
    sizes: dict[str, str] = {}
    for run in runs:
        first.setdefault(run.pid, run.start)
        sizes[history.names.get(run.pid, "")] = _size(run)
    up: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for pid, started in history.started.items():
        place = history.names.get(pid, "")
        if place in sizes:
            begin = min(first.get(pid, math.inf), started + START_UNSEEN_SECONDS)
            end = min(history.stopped.get(pid, math.inf), executions.process_ends.get(pid, math.inf))
            up[sizes[place]] += [span[:2] for span in executions.active(Run("", 0, pid, begin, end))]
    return up


def _covered(spans: Iterable[tuple[float, float]], begin: float, end: float) -> float:
    """Seconds between two times that at least one of the spans covers."""
    seconds = 0.0
    for start, over in sorted(spans):
        seconds += max(0.0, min(over, end) - max(start, begin))
        begin = max(begin, over)
    return seconds


def _summary(waits: Sequence[tuple[float, float]]) -> Waits:
    all_, up = (sorted(each) for each in zip(*waits, strict=True))

    def at(share: float, waits: list[float]) -> float:
        return round(waits[min(len(waits) - 1, int(share * len(waits)))], 2)

    return Waits(at(0.5, all_), at(0.99, all_), at(1, all_), len(waits), at(0.5, up))
