"""Agenda of the leader: due time of each schedule, and its submission, prepared in advance."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..broker.requests import Occurrence


class Agenda:
    """Priority queue of the next runs of all schedules, as stored in Redis.

    Args:
        make: makes the occurrence of a schedule with that due time (ms); an exception is passed to `failed`.
        failed: called with the schedule and the exception; must defer the schedule.
    """

    def __init__(
        self, make: Callable[[str, int], Occurrence], failed: Callable[[str, BaseException], None]
    ) -> None:
        self._make = make
        self._failed = failed
        self._dues: dict[str, int] = {}
        # Two heaps of (due, schedule). Outdated items stay in them and are skipped when they come first.
        self._by_due: list[tuple[int, str]] = []
        self._unprepared: list[tuple[int, str]] = []
        self._prepared: dict[str, Occurrence] = {}
        self._deferred: dict[str, tuple[float, int]] = {}
        self.paused: dict[str, int] = {}
        """Due time (ms) of each due schedule that is paused."""

    def load(self, next_runs: Iterable[tuple[str, int]]) -> None:
        """Set the due times of schedules (ms)."""
        for schedule, due_ms in next_runs:
            self.note(schedule, due_ms)

    def note(self, schedule: str, due_ms: int) -> None:
        """Set the due time of a schedule (ms)."""
        self._dues[schedule] = due_ms
        self._prepared.pop(schedule, None)
        heapq.heappush(self._by_due, (due_ms, schedule))
        heapq.heappush(self._unprepared, (due_ms, schedule))

    def forget(self, schedule: str) -> None:
        """Remove a schedule after its last run."""
        self._dues.pop(schedule, None)
        self._prepared.pop(schedule, None)

    # --- deferred and paused schedules -------------------------------------------------------------------

    def defer(self, schedule: str, seconds: float) -> None:
        """Defer a schedule that cannot be submitted at the moment."""
        self._deferred[schedule] = (time.monotonic() + seconds, self._dues[schedule])
        self.forget(schedule)

    def requeue(self) -> list[str]:
        """Requeue deferred schedules whose time is over, and return them."""
        again = [schedule for schedule, (until, _) in self._deferred.items() if until <= time.monotonic()]
        for schedule in again:
            self.note(schedule, self._deferred.pop(schedule)[1])
        return again

    def pause(self, schedule: str) -> None:
        """Note that a schedule is paused."""
        self.paused[schedule] = self._dues[schedule]
        self.forget(schedule)

    def resume_except(self, paused: Iterable[str]) -> None:
        """Resume all paused schedules but these."""
        still_paused = set(paused)
        for schedule in [schedule for schedule in self.paused if schedule not in still_paused]:
            self.note(schedule, self.paused.pop(schedule))

    # --- preparation and submission ----------------------------------------------------------------------

    @property
    def first_due_ms(self) -> int | None:
        """Due time of the first schedule (ms); None without schedules."""
        while self._by_due and self._dues.get(self._by_due[0][1]) != self._by_due[0][0]:
            heapq.heappop(self._by_due)
        return self._by_due[0][0] if self._by_due else None

    def prepare(self, seconds: float) -> bool:
        """Prepare submissions, the earliest first, for `seconds` at most. Returns whether some are left."""
        until = time.monotonic() + seconds
        while self._unprepared and time.monotonic() < until:
            due_ms, schedule = heapq.heappop(self._unprepared)
            if self._dues.get(schedule) == due_ms and schedule not in self._prepared:
                self._try_to_make(schedule, due_ms)
        return bool(self._unprepared)

    def _try_to_make(self, schedule: str, due_ms: int) -> Occurrence | None:
        try:
            occurrence = self._prepared[schedule] = self._make(schedule, due_ms)
        except BaseException as error:  # code of the task class may raise anything
            self._failed(schedule, error)
            return None
        return occurrence

    def take_due(self, now_ms: float, at_most: int, seconds: float) -> list[Occurrence]:
        """Take due occurrences in their order, and prepare missing ones for `seconds` at most.

        The caller must call `note`, `forget`, `defer` or `pause` for each.
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
                # It may be there twice: outdated by `defer`, and again from `requeue`.
                while self._by_due and self._by_due[0] == (due_ms, schedule):
                    heapq.heappop(self._by_due)
        return taken
