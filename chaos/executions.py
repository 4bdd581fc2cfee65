"""One execution: failures during it, and when its process was able to run it.

An execution is *disturbed* by what happened while its worker had the task: from its start to `SETTLE_SECONDS`
after its end, for its settlement may have been on its way. An execution that begins within `AFTER_SECONDS` of the
end of a disturbance is disturbed as well: the worker had been given it before, and did not know yet what it had
lost. Shorter pauses, holds and outages than `SERIOUS` of a lease disturb nothing: the last renewal was at most a
third of a lease before, and one that failed is tried again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from .drive import Observed
from .records import Records, Run

SETTLE_SECONDS = 1.0
AFTER_SECONDS = 1.0
STOP_SECONDS = 5.0
#: A process that is younger may still be starting: on a busy machine that takes seconds.
START_SECONDS = 10.0
#: The same for one that has begun no task: it takes longest where the machine does too much at once.
START_UNSEEN_SECONDS = 30.0
SERIOUS = 0.6

KILLED = "its worker was killed"
BESIDE_POISON = "its worker was killed by a poison task"
PAUSED = "its worker was paused"
DISCONNECTED = "its worker was disconnected"
SERVER_UNAVAILABLE = "the server was unavailable"
DATA_LOST = "the server lost data"
STOPPED = "its worker was stopped"
REASONS = (KILLED, BESIDE_POISON, PAUSED, DISCONNECTED, SERVER_UNAVAILABLE, DATA_LOST, STOPPED)


class Executions:
    """Relates executions to the failures of processes, links and servers."""

    def __init__(self, observed: Observed, records: Records, lease: float) -> None:
        history = observed.history
        self._history = history
        self._killed_by_task = records.killed_by_task
        self._outages = observed.outages
        self._serious_seconds = SERIOUS * lease
        self.process_ends = {**{pid: at for pid, (at, _) in history.ended.items()}, **history.killed}
        for pid, at in records.killed_by_task.items():
            self.process_ends[pid] = min(at, self.process_ends.get(pid, at))
        self.violent = {*history.killed, *records.killed_by_task}

    def disturbances(self, run: Run) -> Iterator[tuple[float, str]]:
        """Times and kinds of its disturbances."""
        until = float("inf") if run.end is None else run.end + SETTLE_SECONDS

        def meets(begin: float, over: float) -> bool:
            return run.start <= over + AFTER_SECONDS and begin <= until

        if run.pid in self.violent and self.process_ends[run.pid] <= until:
            yield self.process_ends[run.pid], BESIDE_POISON if run.pid in self._killed_by_task else KILLED
        for begin, over in self.pauses(run.pid):
            if meets(begin, over):
                yield begin, PAUSED
        for begin, over in self.disconnected(run.pid):
            if meets(begin, over):
                yield begin, DISCONNECTED
        for outage in self._outages:
            if outage.end - outage.begin > self._serious_seconds and meets(outage.begin, outage.end):
                yield outage.begin, SERVER_UNAVAILABLE
            if outage.lost_from < math.inf and meets(outage.forgets_from, outage.over):
                yield max(run.start, outage.forgets_from), DATA_LOST
        ended, code = self._history.ended.get(run.pid, (0.0, -1))
        if run.how == "CancelledError" and code == 0 and 0 <= ended - (run.end or 0) <= STOP_SECONDS:
            yield run.end or run.start, STOPPED

    def first_disturbance(self, run: Run) -> tuple[float, str] | None:
        """The one that began first; None: nothing disturbed it."""
        return min(self.disturbances(run), default=None)

    def pauses(self, pid: int) -> list[tuple[float, float]]:
        """The serious ones."""
        return self._serious(self._history.pauses.get(pid, ()))

    def disconnected(self, pid: int) -> list[tuple[float, float]]:
        """Times in which its link let nothing through in time."""
        return self._serious(self._history.disconnected.get(self._history.names.get(pid, ""), ()))

    def _serious(self, found: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(begin, over) for begin, over in found if over - begin > self._serious_seconds]

    def end(self, run: Run) -> float:
        """Its end, or that of its process."""
        return run.end if run.end is not None else self.process_ends.get(run.pid, float("inf"))

    def active(self, run: Run) -> Iterator[tuple[float, float, bool]]:
        """From when to when its process was able to run it, and whether that was after a serious pause.

        While a process is stopped nothing can run in it; after that, it needs a moment to cancel what it has lost.
        """
        start, end, late = run.start, self.end(run), False
        for begin, over in sorted(self._history.pauses.get(run.pid, ())):
            serious = over - begin > self._serious_seconds
            if over <= start:
                late = late or (serious and start - over <= AFTER_SECONDS)
            elif begin < end:
                if begin > start:
                    yield start, begin, late
                start, late = over, late or serious
        if start < end:
            yield start, end, late

    def was_late(self, run: Run) -> bool:
        """True if it may have begun later than the server allowed it to: by a pause, its link, or the server."""
        spans = [*self.pauses(run.pid), *self.disconnected(run.pid)]
        spans += [(outage.begin, outage.end) for outage in self._outages]
        return any(begin <= run.start <= over + AFTER_SECONDS for begin, over in spans)

    def may_be_forgotten(self, start: float, end: float, for_seconds: float) -> bool:
        """True if the server may have lost data of that age between these times."""
        return any(
            outage.forgets_from <= end and start <= outage.lost_until + for_seconds for outage in self._outages
        )
