"""Recovery times of tasks after the failure of their worker, by case."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from . import executions as by
from .drive import Observed
from .executions import Executions
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

    def __str__(self) -> str:
        return f"{self.p50:g} / {self.p99:g} / {self.max:g}"


def recovery(
    executions: Executions, observed: Observed, runs_of_tasks: Iterable[list[Run]], runs: list[Run]
) -> dict[str, Waits]:
    """Case -> how long tasks waited; cases that did not happen are left out."""
    waits: dict[str, list[float]] = {case: [] for case in (*_CASES.values(), _SERVER_UNAVAILABLE)}
    for tries in runs_of_tasks:
        for run, following in pairwise(tries):
            disturbance = executions.first_disturbance(run)
            if run.kind not in _WITHOUT_LOCKS or disturbance is None or disturbance[1] not in _CASES:
                continue
            if following.start > disturbance[0]:
                waits[_CASES[disturbance[1]]].append(following.start - disturbance[0])
    for outage in observed.outages:
        lived = {
            run.pid
            for run in runs
            if run.start < outage.begin
            and executions.process_ends.get(run.pid, math.inf) > outage.end + _ALIVE_SECONDS
        }
        first = min((run.start for run in runs if run.pid in lived and run.start > outage.end), default=None)
        if first is not None:
            waits[_SERVER_UNAVAILABLE].append(first - outage.end)
    return {case: _summary(sorted(each)) for case, each in waits.items() if each}


def _summary(waits: list[float]) -> Waits:
    def at(share: float) -> float:
        return round(waits[min(len(waits) - 1, int(share * len(waits)))], 2)

    return Waits(at(0.5), at(0.99), at(1), len(waits))
