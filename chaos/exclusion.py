"""Check of mutual exclusion by time: executions that share a lock must not overlap.

There is no excuse for a worker that was disconnected or whose server was unavailable: its own timer has to cancel
what holds a lock before the server can give the lock to another. Only a stopped process (SIGSTOP) cannot do that;
what it does when it is resumed is counted on its own, and must end within `RESUMED_SECONDS`: its timer has to be
scheduled, and the cancellation to arrive. And only a server that has lost the lock itself can give it twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from .executions import Executions
from .records import Run

#: After the SIGCONT of a process that was stopped beyond its lease.
RESUMED_SECONDS = 0.25
READERS = ("Reads", "ReadsLong")


@dataclass
class Overlaps:
    """Each is described in words."""

    proper: list[str] = field(default_factory=list)
    resumed: list[float] = field(default_factory=list)
    """Seconds for which executions of resumed processes overlapped with others."""
    data_lost: list[float] = field(default_factory=list)
    """Seconds for which two had a lock that the server had forgotten."""


@dataclass(frozen=True, slots=True)
class _Active:
    start: float
    end: float
    late: bool
    run: Run


def overlaps(executions: Executions, holds: Iterable[tuple[Run, list[str]]], lease: float) -> Overlaps:
    """Compare all executions with the keys that they hold."""
    by_key: dict[str, list[_Active]] = defaultdict(list)
    for run, keys in holds:
        for start, end, late in executions.active(run):
            for key in keys:
                by_key[key].append(_Active(start, end, late, run))
    found = Overlaps()
    for key, spans in by_key.items():
        spans.sort(key=lambda span: span.start)
        open_: list[_Active] = []
        for span in spans:
            open_ = [other for other in open_ if other.end > span.start]
            for other in open_:
                if other.run is span.run or {other.run.kind, span.run.kind} <= set(READERS):
                    continue
                seconds = min(other.end, span.end) - span.start
                if other.late or span.late:
                    found.resumed.append(seconds)
                elif executions.may_be_forgotten(span.start, span.start, lease):
                    found.data_lost.append(seconds)
                else:
                    found.proper.append(
                        f"{key}: {other.run.kind} {other.run.n} (pid {other.run.pid}) and "
                        f"{span.run.kind} {span.run.n} (pid {span.run.pid}), {seconds:.4f} s at {span.start:.3f}"
                    )
            open_.append(span)
    return found
