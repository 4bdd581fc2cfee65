"""Occurrences in the local time of a zone whose clocks are changed.

A wall time that the clocks skip is taken as if they had not been set forward yet (RFC 5545, 3.3.5): it runs once,
and no day is left out. One that comes twice runs the first time only, unless the rule has a rhythm: then it goes
on, and what runs round the clock never pauses for longer than on other days. For that it may run once between its
wall times.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import datetime, timedelta, tzinfo

#: The International Date Line was moved around whole islands: no clock was ever changed by more.
_LONGEST_CHANGE = timedelta(days=1)
_MOMENT = timedelta(microseconds=1)

AfterAtOffset = Callable[[datetime, timedelta], datetime | None]


def next_in_zone(
    after: AfterAtOffset, zone: tzinfo, moment: datetime, rhythm_hours: Collection[int]
) -> datetime | None:
    """Return the first occurrence strictly after `moment` (UTC), or None.

    Args:
        after: the first occurrence (UTC) strictly after a moment (UTC), were the UTC offset always the given one.
        rhythm_hours: local hours in which the rhythm of the rule must not pause; none for a rule that names its
            times.
    """
    begin = (moment - _LONGEST_CHANGE).replace(microsecond=0)  # what the clocks skipped before is over
    offset = _offset(zone, begin)
    found: datetime | None = None
    while found is None or begin < found:
        # In the time from `begin` to the next change of the clocks, and for a while after it.
        candidate = after(max(moment, begin - _MOMENT), offset)
        known = [each for each in (candidate, found) if each is not None]
        change = _first_change(zone, begin, min(known, default=max(begin, moment) + 2 * _LONGEST_CHANGE))
        if change is None:
            return min(known, default=None)
        jump = _offset(zone, change) - offset
        until: datetime | None = change
        if jump > timedelta(0):
            until = change + jump  # what is skipped comes as much later
        elif rhythm_hours:
            until = after(change - _MOMENT, offset + jump)  # goes on until the new time has taken over
            while candidate and until and change <= candidate < until:
                if candidate.astimezone(zone).hour in rhythm_hours:
                    break
                candidate = after(candidate, offset)
        if candidate and candidate < (until or change):
            found = min(candidate, found or candidate)
        begin = change if rhythm_hours else max(change, change - jump)
        offset += jump
    return found


def _first_change(zone: tzinfo, begin: datetime, end: datetime) -> datetime | None:
    """Find the first change of the UTC offset after `begin` (a whole second), until `end`; None: there is none."""
    offset = _offset(zone, begin)
    while begin < end:
        here = min(begin + _LONGEST_CHANGE, end)
        if _offset(zone, here) != offset:
            low, high = 0, -(-(here - begin) // timedelta(seconds=1))
            while high - low > 1:
                middle = (low + high) // 2
                if _offset(zone, begin + timedelta(seconds=middle)) == offset:
                    low = middle
                else:
                    high = middle
            return begin + timedelta(seconds=high)
        begin = here
    return None


def _offset(zone: tzinfo, moment: datetime) -> timedelta:
    return moment.astimezone(zone).utcoffset() or timedelta(0)
