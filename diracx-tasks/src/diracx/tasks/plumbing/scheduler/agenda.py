"""Agenda of the leader: when each schedule is due, and its submission, prepared beforehand."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..broker.requests import Occurrence


class Agenda:
    """The next runs of all schedules, as Redis has them.

    Args:
        make: the occurrence of a schedule that is due then (ms); whatever it raises is told to `failed`.
        failed: called with the schedule and what was raised; the schedule is put aside.
    """

    def __init__(self, make: Callable[[str, int], Occurrence], failed: Callable[[str, Exception], None]) -> None:
        self._make = make
        self._failed = failed
        self._dues: dict[str, int] = {}
        # Two heaps of (due, schedule). What is no longer so is left in them and passed over when it comes up.
        self._by_due: list[tuple[int, str]] = []
        self._unprepared: list[tuple[int, str]] = []
        self._prepared: dict[str, Occurrence] = {}
        self._aside: dict[str, tuple[float, int]] = {}
        self._paused: dict[str, int] = {}

    def load(self, next_runs: Iterable[tuple[str, int]]) -> None:
        """Note when schedules are due (ms)."""
        for schedule, due_ms in next_runs:
            self.note(schedule, due_ms)

    def note(self, schedule: str, due_ms: int) -> None:
        """Note when a schedule is due (ms)."""
        self._dues[schedule] = due_ms
        self._prepared.pop(schedule, None)
        heapq.heappush(self._by_due, (due_ms, schedule))
        heapq.heappush(self._unprepared, (due_ms, schedule))

    def forget(self, schedule: str) -> None:
        """Remove a schedule after its last run."""
        self._dues.pop(schedule, None)
        self._prepared.pop(schedule, None)

    # --- what cannot be submitted at the moment ----------------------------------------------------------

    def defer(self, schedule: str, seconds: float) -> None:
        """Defer a schedule."""
        self._aside[schedule] = (time.monotonic() + seconds, self._dues[schedule])
        self.forget(schedule)

    def requeue(self) -> list[str]:
        """Requeue deferred schedules whose time has come."""
        again = [schedule for schedule, (until, _) in self._aside.items() if until <= time.monotonic()]
        for schedule in again:
            self.note(schedule, self._aside.pop(schedule)[1])
        return again

    def pause(self, schedule: str) -> None:
        """Note that a schedule is paused."""
        self._paused[schedule] = self._dues[schedule]
        self.forget(schedule)

    @property
    def has_paused(self) -> bool:
        """True if anything that is due is paused."""
        return bool(self._paused)

    def go_on(self, paused: Iterable[str]) -> None:
        """Resume all paused schedules but these."""
        still = set(paused)
        for schedule in [schedule for schedule in self._paused if schedule not in still]:
            self.note(schedule, self._paused.pop(schedule))

    # --- before the moment, and at it --------------------------------------------------------------------

    @property
    def first_due_ms(self) -> int | None:
        """Return when the first schedule is due (ms); None when none is."""
        while self._by_due and self._dues.get(self._by_due[0][1]) != self._by_due[0][0]:
            heapq.heappop(self._by_due)
        return self._by_due[0][0] if self._by_due else None

    def prepare(self, seconds: float) -> bool:
        """Prepare submissions, the earliest first, for at most so long. Returns whether some are left."""
        until = time.monotonic() + seconds
        while self._unprepared and time.monotonic() < until:
            due_ms, schedule = heapq.heappop(self._unprepared)
            if self._dues.get(schedule) == due_ms and schedule not in self._prepared:
                self._try_to_make(schedule, due_ms)
        return bool(self._unprepared)

    def _try_to_make(self, schedule: str, due_ms: int) -> Occurrence | None:
        try:
            occurrence = self._prepared[schedule] = self._make(schedule, due_ms)
        except Exception as error:
            self._failed(schedule, error)
            return None
        return occurrence

    def take_due(self, now_ms: float, at_most: int, seconds: float) -> list[Occurrence]:
        """Take what is due now, in its order; the unprepared is prepared, for at most so long.

        Each is to be answered with `note`, `forget`, `defer` or `pause`.
        """
        until = time.monotonic() + seconds
        taken: list[Occurrence] = []
        while len(taken) < at_most and (due_ms := self.first_due_ms) is not None and due_ms <= now_ms:
            schedule = self._by_due[0][1]
            occurrence = self._prepared.get(schedule)
            if occurrence is None:
                if taken and time.monotonic() >= until:
                    break
                occurrence = self._try_to_make(schedule, due_ms)
            if occurrence is not None:
                taken.append(occurrence)
                heapq.heappop(self._by_due)
        return taken
