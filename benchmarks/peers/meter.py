"""Count executed tasks almost without cost: each thread of a worker counts in memory shared with
the controller, and no task sends a command for it.

One file per process and thread, of 8-byte words: executions, when the first and the last began (monotonic clock,
which all processes of a machine share), the number of samples, and the samples.
"""

from __future__ import annotations

import mmap
import os
import statistics
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

#: Names the directory of the files.
VARIABLE = "BENCH_METER"
_COUNT, _FIRST, _LAST, _SAMPLES, _HEAD = range(5)
#: Samples that one thread can note.
_ROOM = 10_000
_BYTES = 8 * (_HEAD + _ROOM)


class _Slot(threading.local):
    """The file of this thread, made when its first task runs."""

    def __init__(self) -> None:
        # Threads that have ended leave their identifiers to others: a counter that is read must not be made anew.
        path = Path(os.environ[VARIABLE], f"{os.getpid()}-{os.urandom(8).hex()}")
        with path.open("xb+") as file:
            file.truncate(_BYTES)
            shared = memoryview(mmap.mmap(file.fileno(), _BYTES))
        self.counts = shared.cast("Q")
        self.moments = shared.cast("d")
        self.moments[_FIRST] = time.monotonic()


_slots: list[_Slot] = []


def tick() -> None:
    """Count an execution, which begins now."""
    if not _slots:
        _slots.append(_Slot())
    slot = _slots[0]
    slot.moments[_LAST] = time.monotonic()
    slot.counts[_COUNT] += 1


def sample(seconds: float) -> None:
    """Note a latency, and count the execution it belongs to."""
    tick()
    slot = _slots[0]
    noted = slot.counts[_SAMPLES]
    if noted < _ROOM:
        slot.moments[_HEAD + noted] = seconds
        slot.counts[_SAMPLES] = noted + 1


@dataclass(frozen=True)
class Reading:
    """Counts of all threads of all workers."""

    count: int
    first: float
    """Time when the first execution began, on the monotonic clock; infinite when there was none."""
    last: float
    """Time when the last one began."""
    processes: int
    """Number of processes that executed a task."""


class Meter:
    """The controller's side: reads a directory of such files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: dict[str, memoryview] = {}

    def read(self) -> Reading:
        self._poll()
        heads = [(view.cast("Q")[_COUNT], view.cast("d")) for view in self._files.values()]
        heads = [(count, moments) for count, moments in heads if count]
        return Reading(
            count=sum(count for count, _ in heads),
            first=min((moments[_FIRST] for _, moments in heads), default=float("inf")),
            last=max((moments[_LAST] for _, moments in heads), default=0.0),
            processes=len({name.partition("-")[0] for name in self._files}),
        )

    def samples(self) -> list[float]:
        """All noted latencies, in seconds."""
        self._poll()
        return [
            value
            for view in self._files.values()
            for value in view.cast("d")[_HEAD : _HEAD + view.cast("Q")[_SAMPLES]]
        ]

    def _poll(self) -> None:
        for entry in os.scandir(self.directory):
            if entry.name not in self._files and entry.stat().st_size == _BYTES:
                with open(entry.path, "rb") as file:
                    view = mmap.mmap(file.fileno(), _BYTES, access=mmap.ACCESS_READ)
                self._files[entry.name] = memoryview(view)


def percentiles(values: Iterable[float]) -> tuple[float, float]:
    """The 50th and the 99th."""
    cuts = statistics.quantiles(values, n=100)
    return cuts[49], cuts[98]
