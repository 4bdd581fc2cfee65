"""Occurrences in local time across daylight-saving changes.

A skipped wall time is interpreted with the UTC offset before the change (RFC 5545, 3.3.5), so that it runs once. A
repeated wall time runs the first time only, unless the rule has a rhythm: then it continues, so that the interval
between runs does not become longer. For that, one run may be at another wall time, but on a day of the rule.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection
from datetime import UTC, datetime, time, timedelta, tzinfo

#: Largest change of a UTC offset: across the International Date Line.
_LONGEST_CHANGE = timedelta(days=1)
_MOMENT = timedelta(microseconds=1)

AfterAtOffset = Callable[[datetime, timedelta], datetime | None]


def next_in_zone(
    after: AfterAtOffset, zone: tzinfo, moment: datetime, rhythm_hours: Collection[int]
) -> datetime | None:
    """Return the first occurrence strictly after `moment` (UTC), or None.

    Args:
        after: returns the first occurrence (UTC) strictly after a moment (UTC), for a constant UTC offset.
        rhythm_hours: local hours in which the rhythm of the rule must not pause; none for a rule with fixed
            times.
    """
    begin = (moment - _LONGEST_CHANGE).replace(microsecond=0)  # earlier changes have no effect any more
    offset = _offset(zone, begin)
    found: datetime | None = None
    while found is None or begin < found:
        # Valid from `begin` to the next change, and for some time after it.
        candidate = after(max(moment, begin - _MOMENT), offset)
        known = [each for each in (candidate, found) if each is not None]
        change = _first_change(zone, begin, min(known, default=max(begin, moment) + 2 * _LONGEST_CHANGE))
        if change is None:
            return min(known, default=None)
        jump = _offset(zone, change) - offset
        until: datetime | None = change
        if jump > timedelta(0):
            until = change + jump  # skipped times are as much later
        elif rhythm_hours:
            first = after(change - _MOMENT, offset + jump)  # continues until the first run in the new offset
            until = first and min(first, change + _LONGEST_CHANGE)
            while candidate and until and change <= candidate < until:
                local = candidate.astimezone(zone)
                midnight = datetime.combine(local.date(), time(), UTC) - offset - jump
                that_day = after(midnight - _MOMENT, offset + jump)
                if local.hour in rhythm_hours and that_day and that_day < midnight + timedelta(days=1):
                    break
                rest = timedelta(hours=1) - timedelta(minutes=local.minute, seconds=local.second)
                candidate = after(candidate + rest - _MOMENT, offset)
        if candidate and candidate < (until or change):
            found = min(candidate, found or candidate)
        begin = change if rhythm_hours else max(change, change - jump)
        offset += jump
    return found


def _first_change(zone: tzinfo, begin: datetime, end: datetime) -> datetime | None:
    """Find the first change of the UTC offset after `begin` (a whole second) and until `end`, if any."""
    offset = _offset(zone, begin)

    def has_changed(seconds: int) -> bool:
        return _offset(zone, begin + timedelta(seconds=seconds)) != offset

    while begin < end:
        step_end = min(begin + _LONGEST_CHANGE, end)
        if _offset(zone, step_end) != offset:
            seconds = range(-(-(step_end - begin) // timedelta(seconds=1)) + 1)
            return begin + timedelta(seconds=bisect_left(seconds, True, key=has_changed))
        begin = step_end
    return None


def _offset(zone: tzinfo, moment: datetime) -> timedelta:
    return moment.astimezone(zone).utcoffset() or timedelta(0)
