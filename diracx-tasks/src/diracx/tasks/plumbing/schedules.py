"""Schedules of periodic tasks: intervals, cron expressions and recurrence rules.

A schedule is a pure function from a time to the next occurrence after it, without state.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from typing import Any, ClassVar
from zoneinfo import ZoneInfo

from ._util.local_time import next_in_zone


class TaskScheduleBase(ABC):
    """Base class of schedules.

    Subclasses must define `next_occurrence`. With `next_after` they also keep their phase if the scheduler is
    late.
    """

    @abstractmethod
    def next_occurrence(self) -> datetime:
        """Return the first occurrence after now, as an aware datetime in UTC.

        Raises `ValueError` if there is none.
        """

    def next_after(self, moment: datetime) -> datetime:
        """Return the first occurrence strictly after `moment` (aware), in UTC.

        Raises `ValueError` if there is none.
        """
        return self.next_occurrence()

    @property
    def fingerprint(self) -> str:
        """Return a string that identifies the schedule in all processes.

        The scheduler stores it with the next run, to detect that the schedule has changed.
        """
        fields = ",".join(f"{name}={value!r}" for name, value in sorted(vars(self).items()))
        # The default repr has the address of the object, which differs between processes.
        fields = re.sub(r" at 0x[0-9a-fA-F]+", "", fields)
        return f"{type(self).__module__}.{type(self).__qualname__}:{fields}"

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)


_LONGEST_SECONDS = 36_525 * 86_400


class IntervalSeconds(TaskScheduleBase):
    """Interval in seconds (fractions allowed), counted from the previous occurrence."""

    def __init__(self, seconds: float) -> None:
        """Raise `ValueError` unless `seconds` is a number above zero and at most a century."""
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            raise ValueError(f"IntervalSeconds({seconds!r}): seconds must be a number")
        if not 0 < seconds <= _LONGEST_SECONDS:  # refuses nan and infinity too
            raise ValueError(f"IntervalSeconds({seconds!r}): seconds must be above 0 and at most a century")
        if seconds < 0.001:  # due times are in milliseconds
            raise ValueError(f"IntervalSeconds({seconds!r}): seconds cannot be less than a millisecond")
        self.seconds = seconds

    def next_occurrence(self) -> datetime:
        """Return now plus the interval."""
        return self.next_after(datetime.now(UTC))

    def next_after(self, moment: datetime) -> datetime:
        """Return `moment` plus the interval: called with the last due time, it keeps the phase."""
        return _utc(moment) + timedelta(seconds=self.seconds)

    @property
    def fingerprint(self) -> str:
        """Return `interval:` and the seconds."""
        seconds = int(self.seconds) if self.seconds == int(self.seconds) else self.seconds
        return f"interval:{seconds!r}"

    def __str__(self) -> str:
        return f"every {self.seconds:g} s"

    def __repr__(self) -> str:
        return f"IntervalSeconds({self.seconds!r})"


class _RuleSchedule(TaskScheduleBase):
    """Base class of schedules with the text of a rule, in UTC or in an IANA time zone."""

    _kind: ClassVar[str]
    _rhythm_hours: Collection[int] = ()
    """Hours in which it continues when clocks are set back; none if it has fixed times."""
    lacks_dtstart = False
    """It has a COUNT, but no DTSTART to count from."""

    def __init__(self, text: str, timezone: str | None) -> None:
        self._text = text
        self.timezone = timezone
        self._zone: tzinfo | None = None if timezone is None else _zone(timezone)

    def next_occurrence(self) -> datetime:
        """Return the first occurrence after now; `ValueError` if there is none."""
        return self.next_after(datetime.now(UTC))

    def next_after(self, moment: datetime) -> datetime:
        """Return the first occurrence strictly after `moment`; `ValueError` if there is none."""
        moment = _utc(moment)
        if self._zone is None:
            found = self._after(moment, timedelta(0))
        else:
            found = next_in_zone(self._after, self._zone, moment, self._rhythm_hours)
        if found is None:
            hint = ": COUNT counts from DTSTART, and the rule has none" if self.lacks_dtstart else ""
            raise ValueError(f"{self!r} has no occurrence after {moment.isoformat()}{hint}")
        return found

    @abstractmethod
    def _after(self, moment: datetime, offset: timedelta) -> datetime | None:
        """Return the first occurrence (UTC) strictly after a moment (UTC), for a constant UTC offset."""

    @property
    def fingerprint(self) -> str:
        """Return the kind and the rule on one line, with the zone if given."""
        zone = f"@{self.timezone}" if self.timezone is not None else ""
        return f"{self._kind}{zone}:{' '.join(self._text.split())}"

    def __str__(self) -> str:
        zone = f" ({self.timezone})" if self.timezone else ""
        return f"{self._kind} {' '.join(self._text.split())}{zone}"

    def __repr__(self) -> str:
        zone = f", timezone={self.timezone!r}" if self.timezone is not None else ""
        return f"{type(self).__name__}({self._text!r}{zone})"


#: Maximum number of years to the next occurrence.
_CRON_YEARS = 130


class CronSchedule(_RuleSchedule):
    """Cron expression of five fields (six with seconds last), or a nickname such as `@hourly`.

    If both day of month and day of week are given, one of them must match, as in Vixie cron; `*/2` counts as
    given, unlike there.

    It is in UTC, or in the IANA zone `timezone`. In a repeated hour at the end of daylight-saving time, an
    expression with a rhythm continues: one with a `*`, a range or a step as hours, or a `*` as minutes. One with
    fixed hours runs once. A skipped time runs later by the length of the change.
    """

    _kind = "cron"

    def __init__(self, expression: str, *, timezone: str | None = None) -> None:
        """Raise `ValueError` naming the expression or the zone if it is invalid or never fires."""
        from croniter import croniter

        if not isinstance(expression, str):
            raise ValueError(f"bad cron expression {expression!r}: it must be a string")
        if re.search(r"(^|\s)[RrHh]\b", expression):
            # Random fields of croniter would have another value after each restart.
            raise ValueError(f"bad cron expression {expression!r}: random or hashed fields are not supported")
        super().__init__(expression, timezone)
        self.expression = expression
        # croniter reads `9-9` as every value, other crons as one.
        self._fields = re.sub(r"[^\s,]+", lambda part: _one_value(part[0]), expression)
        try:
            # From the first year of croniter: an expression for past years is exhausted, not invalid.
            fields = croniter(self._fields, datetime(1970, 1, 1), max_years_between_matches=_CRON_YEARS)
            fields.get_next(datetime)
        except Exception as exc:
            raise ValueError(f"bad cron expression {expression!r}: {exc}") from exc
        self._rhythm_hours = _hours_of_rhythm(fields.expressions, fields.expanded[1])

    def _after(self, moment: datetime, offset: timedelta) -> datetime | None:
        from croniter import CroniterError, croniter

        local = (moment + offset).replace(tzinfo=None)
        try:
            found: datetime = croniter(self._fields, local, max_years_between_matches=_CRON_YEARS).get_next(
                datetime
            )
        except CroniterError:
            return None
        return found.replace(tzinfo=UTC) - offset


def _one_value(part: str) -> str:
    """Part of a cron field, as a value if it is a range of one value."""
    first, _, rest = part.partition("-")
    last, slash, step = rest.partition("/")
    is_one = first and last and first.lstrip("0").casefold() == last.lstrip("0").casefold()
    return first if is_one and (step.isdecimal() or not slash) else part


def _hours_of_rhythm(fields: list[str], hours: list[Any]) -> Collection[int]:
    """Return the hours of rhythm of a cron expression; none if it has fixed hours."""
    minute_field, hour_field = fields[:2]
    if not (minute_field.startswith("*") or {"*", "-", "/"} & set(hour_field)):
        return ()
    named = list(range(24)) if hours == ["*"] else sorted(hours)
    steps = {(later - hour) % 24 for hour, later in zip(named, [*named[1:], named[0]], strict=True)}
    # A constant step in hours, round the clock: it may run in any hour.
    return range(24) if len(named) > 1 and len(steps) == 1 else named


#: Fixed start of rules without DTSTART: midnight UTC, a Monday, the first day of a leap year, so that omitted
#: hours, weekdays or days have round values. INTERVAL counts from it.
RRULE_ANCHOR = datetime(1996, 1, 1)

_FIXED_STEPS = {
    "SECONDLY": timedelta(seconds=1),
    "MINUTELY": timedelta(minutes=1),
    "HOURLY": timedelta(hours=1),
    "DAILY": timedelta(days=1),
    "WEEKLY": timedelta(weeks=1),
}
#: The calendar repeats after 400 years. A search for a date without any ends in the year 9999, after minutes.
_CALENDAR = timedelta(days=146_097)
_LATE = datetime(9869, 1, 1)
#: Parts of a rule of a period of up to an hour by which it may have several occurrences in one.
_FINER = {"HOURLY": ("BYMINUTE", "BYSECOND"), "MINUTELY": ("BYSECOND",), "SECONDLY": ()}
_LARGEST_INTERVAL = 10_000_000
#: dateutil iterates over all occurrences of a rule with COUNT: this takes it a tenth of a second.
_LARGEST_COUNT = 10_000
#: Dates that one search for the next occurrence examines if some are excluded: in a few seconds.
_MOST_DATES = 500_000
_DAYS = re.compile(r"\b(?:BY(?:MONTH|MONTHDAY|YEARDAY|WEEKNO|DAY)|WKST)=[^;]*")
_TIMES_OF_DAY = {"BYHOUR": "HOURLY", "BYMINUTE": "MINUTELY", "BYSECOND": "SECONDLY"}
_DTSTART = re.compile(r"(?:^|\s)DTSTART((?:;[^:;\s]+)*):(\S+)", re.IGNORECASE)


class RRuleSchedule(_RuleSchedule):
    """Recurrence rule of RFC 5545 (formerly RFC 2445), optionally with DTSTART, EXDATE and RDATE lines.

    A rule without DTSTART starts at `RRULE_ANCHOR`, so that `INTERVAL=2` means the same days in every process.
    COUNT, 10,000 at most, counts from DTSTART, as in the RFC: without it, all occurrences are in the past. Times
    are in UTC unless DTSTART has a TZID, or an IANA zone is given as `timezone`; UNTIL is then in UTC, as in the
    RFC. With a zone, HOURLY, MINUTELY and SECONDLY count elapsed time, unless the rule has hours, minutes or
    seconds. Other rules are in local time: a repeated time runs once, and a skipped one later by the length of the
    change.
    """

    _kind = "rrule"

    def __init__(self, rule: str, *, timezone: str | None = None) -> None:
        """Raise `ValueError` naming the rule or the zone if it is invalid or never fires."""
        if not isinstance(rule, str):
            raise ValueError(f"bad recurrence rule {rule!r}: it must be a string")
        super().__init__(rule, timezone)
        self.rule = rule
        try:
            self._start, self._body = _split_dtstart(rule, self._zone)
            self._zone = self._start.tzinfo
            self._parameters = _parameters(self._body)
            self.lacks_dtstart = "COUNT" in self._parameters and not _DTSTART.search(rule)
            lines = self._body.split()
            self._rules = [(line, _parameters(line)) for line in lines if "FREQ=" in line.upper()]
            self._dates = " ".join(line for line in lines if "FREQ=" not in line.upper())
            self._check_rules()
            if self._parameters.get("FREQ") in _TIMES_OF_DAY.values():
                hours = self._parameters.get("BYHOUR")
                self._rhythm_hours = range(24) if hours is None else [int(hour) for hour in hours.split(",")]
            first = next(iter(self._parse(self._start)), None)
        except Exception as exc:
            reason = str(exc)
            if isinstance(exc, TypeError):  # its message in dateutil is not for users
                missing = "FREQ" not in self._parameters
                reason = "FREQ is missing" if missing else "give all its dates a time zone, or none"
            raise ValueError(f"bad recurrence rule {rule!r}: {reason}") from exc
        if first is None and "UNTIL" not in self._parameters and "EXDATE" not in rule.upper():
            raise ValueError(f"bad recurrence rule {rule!r}: no date matches it")

    def _check_rules(self) -> None:
        """Raise `ValueError` for an invalid rule, and for one that would occupy dateutil for minutes."""
        _rrulestr(self._body, self._start)
        for line, parameters in self._rules:
            interval = int(parameters.get("INTERVAL", "1"))
            if not 1 <= interval <= _LARGEST_INTERVAL:
                raise ValueError(f"INTERVAL must be at least 1 and at most {_LARGEST_INTERVAL}")
            if int(parameters.get("COUNT", "0")) > _LARGEST_COUNT:
                raise ValueError(f"COUNT must be at most {_LARGEST_COUNT}: use UNTIL instead")
            if (finer := _FINER.get(parameters.get("FREQ", ""))) is not None and "BYSETPOS" in parameters:
                size = math.prod(parameters.get(name, "").count(",") + 1 for name in finer)
                if all(abs(int(position)) > size for position in parameters["BYSETPOS"].split(",")):
                    raise ValueError("no date matches it")
            if "BYEASTER" not in line.upper():
                rule = re.sub(r";?\b(COUNT|UNTIL)=[^;]*", "", line.upper().rpartition(":")[2])
                start = self._start.replace(tzinfo=None)
                late = start + max(0, (_LATE - start) // _CALENDAR) * _CALENDAR
                # Its days alone are searched faster than its hours or seconds.
                days = ["FREQ=DAILY;" + ";".join(_DAYS.findall(rule))] if finer is not None else []
                if any(next(iter(_rrulestr(each.strip(";"), late)), None) is None for each in (*days, rule)):
                    raise ValueError("no date matches it")

    def _parse(self, start: datetime, moment: datetime | None = None) -> Any:
        """Parse the rule; with `moment`, for its occurrences after it, without many of the earlier ones."""
        from dateutil.rrule import rruleset

        rules = [
            (line, start if moment is None else _start_near(moment, start, parameters))
            for line, parameters in self._rules
        ]
        if len(rules) == 1 and not self._dates:
            return _rrulestr(*rules[0])
        found = _rrulestr(self._dates, start, as_set=True) if self._dates else rruleset()
        left = iter(range(_MOST_DATES))
        for line, near in rules:
            add = found.exrule if line.upper().startswith("EXRULE") else found.rrule
            add(_counted(_rrulestr(line.rpartition(":")[2], near), left))
        return found

    def _after(self, moment: datetime, offset: timedelta) -> datetime | None:
        if self._zone is None:
            start, local = self._start, moment.replace(tzinfo=None)
        else:
            zone = timezone(offset)
            # A rule without times of day is the same series at each offset; others have the same wall times.
            real_time = self._rhythm_hours and not any(name in self._parameters for name in _TIMES_OF_DAY)
            start = self._start.astimezone(zone) if real_time else self._start.replace(tzinfo=zone)
            local = moment.astimezone(zone)
        found: datetime | None = self._parse(start, local).after(local)
        return None if found is None else _utc(found.replace(tzinfo=found.tzinfo or UTC))


def _split_dtstart(rule: str, zone: tzinfo | None) -> tuple[datetime, str]:
    """Return the start (naive: UTC) and the rule without its DTSTART; `zone` is that of a start without one."""
    found = _DTSTART.search(rule)
    if found is None:
        return RRULE_ANCHOR.replace(tzinfo=zone), rule.strip()
    from dateutil.parser import isoparse

    parameters = dict(part.split("=", 1) for part in found[1].upper().split(";") if "=" in part)
    start = isoparse(found[2])
    if zone is not None and ("TZID" in parameters or start.tzinfo is not None):
        raise ValueError("its DTSTART has a time zone: omit the other one")
    if "TZID" in parameters:
        # Names of zones are case-sensitive, and must not be in upper case.
        name = re.split(r"TZID=", found[1], flags=re.IGNORECASE)[1].split(";")[0]
        own = _zone(name)
        start = start.astimezone(own) if start.tzinfo else start.replace(tzinfo=own)
    elif start.tzinfo is not None:
        start = start.astimezone(UTC).replace(tzinfo=None)
    elif zone is not None:
        start = start.replace(tzinfo=zone)
    return start, (rule[: found.start()] + rule[found.end() :]).strip()


def _rrulestr(text: str, start: datetime, *, as_set: bool = False) -> Any:
    """Parse a rule of RFC 5545, without time zones if its start has none."""
    from dateutil.rrule import rrulestr

    naive = start.tzinfo is None
    return rrulestr(text, dtstart=start, forceset=as_set, ignoretz=naive, tzids=None if naive else ZoneInfo)


def _counted(dates: Iterable[datetime], left: Iterator[int]) -> Any:
    for each in dates:
        if next(left, None) is None:
            raise RuntimeError(f"its EXRULE excludes too much: {_MOST_DATES} dates were examined")
        yield each


def _start_near(moment: datetime, start: datetime, parameters: Mapping[str, str]) -> datetime:
    """Return a start of the same phase shortly before `moment`, as dateutil iterates over all occurrences."""
    step = _FIXED_STEPS.get(parameters.get("FREQ", ""))
    if step is None or "COUNT" in parameters:
        return start
    step *= int(parameters.get("INTERVAL", "1"))
    # One step earlier, as BYSETPOS needs the whole period of the start.
    return start + max(0, (moment - start) // step - 1) * step


def _parameters(body: str) -> dict[str, str]:
    """Return the parameters that this module uses, by name."""
    parts = r"(FREQ|INTERVAL|COUNT|UNTIL|BYSETPOS|BYHOUR|BYMINUTE|BYSECOND)=([^;\s]*)"
    return dict(re.findall(parts, body.upper()))


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (LookupError, ValueError, OSError) as exc:
        raise ValueError(f"unknown time zone {name!r}: give an IANA name such as 'Europe/Zurich'") from exc


def _utc(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise ValueError(f"{moment.isoformat()} has no time zone: pass an aware datetime")
    return moment.astimezone(UTC)
