"""When a periodic task is due: every so many seconds, by cron expression, or by recurrence rule.

A schedule is a pure function from a moment to the next occurrence after it. It keeps no state, so the
scheduler may ask it again after a restart, or ask for the occurrence that follows a missed one, and always
gets the same answer.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

if TYPE_CHECKING:
    from dateutil.rrule import rrule, rruleset


class TaskScheduleBase(ABC):
    """What the scheduler asks of every schedule.

    Subclasses must define `next_occurrence`. One that also defines `next_after` keeps its phase when the
    scheduler is late; without it the scheduler falls back to `next_occurrence`.
    """

    @abstractmethod
    def next_occurrence(self) -> datetime:
        """Return the first occurrence after now, as an aware datetime in UTC.

        Raises `ValueError` when nothing is left in the future.
        """

    def next_after(self, moment: datetime) -> datetime:
        """Return the first occurrence strictly after `moment` (aware), in UTC.

        Raises `ValueError` when nothing is left after `moment`.
        """
        return self.next_occurrence()

    @property
    def fingerprint(self) -> str:
        """A string that is the same in every process and changes when the schedule does.

        The scheduler stores it beside the next run: a changed fingerprint means that the stored run belongs
        to a schedule that is no longer in force.
        """
        fields = ",".join(f"{name}={value!r}" for name, value in sorted(vars(self).items()))
        # An object without a repr of its own shows its address, which differs from process to process.
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
    """Every `seconds` seconds (fractions allowed), counted from the occurrence before."""

    def __init__(self, seconds: float) -> None:
        """Raise `ValueError` unless `seconds` is a number above zero and at most a century."""
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            raise ValueError(f"IntervalSeconds({seconds!r}): seconds must be a number")
        if not 0 < seconds <= _LONGEST_SECONDS:  # refuses nan and infinity too
            raise ValueError(f"IntervalSeconds({seconds!r}): seconds must be above 0 and at most a century")
        if seconds < 0.001:  # what is due is known to the millisecond
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
        """`interval:` and the seconds."""
        seconds = int(self.seconds) if self.seconds == int(self.seconds) else self.seconds
        return f"interval:{seconds!r}"

    def __repr__(self) -> str:
        return f"IntervalSeconds({self.seconds!r})"


class CronSchedule(TaskScheduleBase):
    """A cron expression of five fields (six with seconds last), or a nickname such as `@hourly`.

    It is read in UTC, or in the IANA zone given as `timezone`. There, an expression with fixed hours fires
    once on the night when the clocks go back; one that fires every hour fires in both of the doubled hours.
    """

    def __init__(self, expression: str, *, timezone: str | None = None) -> None:
        """Raise `ValueError` naming the expression or the zone if it is not valid or never fires."""
        from croniter import croniter

        if not isinstance(expression, str):
            raise ValueError(f"bad cron expression {expression!r}: it must be a string")
        if re.search(r"(^|\s)[RrHh]\b", expression):
            # croniter knows random fields; each restart would draw another time.
            raise ValueError(f"bad cron expression {expression!r}: no random or hashed fields, please")
        self.expression = expression
        self.timezone = timezone
        self._zone = _zone(timezone) if timezone is not None else UTC
        try:
            hours = croniter(expression).expanded[1]
            # The first year croniter knows: an expression bound to past years is exhausted, not wrong.
            croniter(expression, datetime(1970, 1, 1, tzinfo=UTC)).get_next(datetime)
        except Exception as exc:
            raise ValueError(f"bad cron expression {expression!r}: {exc}") from exc
        self._every_hour = hours == ["*"] or len(hours) == 24

    def next_occurrence(self) -> datetime:
        """Return the first occurrence after now; `ValueError` if there is none."""
        return self.next_after(datetime.now(UTC))

    def next_after(self, moment: datetime) -> datetime:
        """Return the first occurrence strictly after `moment`; `ValueError` if there is none."""
        from croniter import CroniterError, croniter

        occurrences = croniter(self.expression, _utc(moment).astimezone(self._zone))
        try:
            while True:
                local: datetime = occurrences.get_next(datetime)
                if (local.fold == 0 or self._every_hour) and local.astimezone(UTC) > moment:
                    return local.astimezone(UTC)
        except CroniterError as exc:
            raise ValueError(f"{self!r} has no occurrence after {moment.isoformat()}") from exc

    @property
    def fingerprint(self) -> str:
        """`cron:` and the expression, with the zone where one was given."""
        zone = f"@{self.timezone}" if self.timezone is not None else ""
        return f"cron{zone}:{' '.join(self.expression.split())}"

    def __repr__(self) -> str:
        zone = f", timezone={self.timezone!r}" if self.timezone is not None else ""
        return f"CronSchedule({self.expression!r}{zone})"


#: Where a rule without DTSTART starts: midnight UTC on a Monday, the first day of a leap year, so that a rule
#: which leaves out its hour, weekday or day gets the round one. Fixed, because INTERVAL counts from it.
RRULE_ANCHOR = datetime(1996, 1, 1)

_FIXED_STEPS = {
    "SECONDLY": timedelta(seconds=1),
    "MINUTELY": timedelta(minutes=1),
    "HOURLY": timedelta(hours=1),
    "DAILY": timedelta(days=1),
    "WEEKLY": timedelta(weeks=1),
}
_DTSTART = re.compile(r"(?:^|\s)DTSTART((?:;[^:;\s]+)*):(\S+)", re.IGNORECASE)


class RRuleSchedule(TaskScheduleBase):
    """A recurrence rule of RFC 5545 (RFC 2445 before it), optionally with DTSTART, EXDATE and RDATE lines.

    A rule without DTSTART starts at `RRULE_ANCHOR`, so `INTERVAL=2` means the same days in every process.
    COUNT counts from DTSTART, as the RFC says: without a DTSTART it has been used up long ago. Times are in
    UTC unless DTSTART carries a TZID, or an IANA zone is given as `timezone`; UNTIL is in UTC then, as the RFC
    says.
    """

    def __init__(self, rule: str, *, timezone: str | None = None) -> None:
        """Raise `ValueError` naming the rule or the zone if it is not valid or can never fire."""
        if not isinstance(rule, str):
            raise ValueError(f"bad recurrence rule {rule!r}: it must be a string")
        self.rule = rule
        self.timezone = timezone
        zone = None if timezone is None else _zone(timezone)
        try:
            self._start, self._body = _split_dtstart(rule, zone)
            self._parameters = _parameters(self._body)
            if int(self._parameters.get("INTERVAL", "1")) < 1:
                raise ValueError("INTERVAL must be at least 1")
            first = next(iter(self._parse(self._start)), None)
        except Exception as exc:
            reason = str(exc)
            if isinstance(exc, TypeError):  # what dateutil meets with is not made for readers
                missing = "FREQ" not in self._parameters
                reason = "FREQ is missing" if missing else "give all its dates a time zone, or none"
            raise ValueError(f"bad recurrence rule {rule!r}: {reason}") from exc
        if first is None and "UNTIL" not in self._parameters and "EXDATE" not in rule.upper():
            raise ValueError(f"bad recurrence rule {rule!r}: no date fits it")

    @property
    def counts_from_nowhere(self) -> bool:
        """Whether the rule has a COUNT and no DTSTART to count from."""
        return "COUNT" in self._parameters and not _DTSTART.search(self.rule)

    def _parse(self, start: datetime) -> rrule | rruleset:
        from dateutil.rrule import rrulestr

        if start.tzinfo is None:
            return rrulestr(self._body, dtstart=start, ignoretz=True)
        return rrulestr(self._body, dtstart=start, tzids=ZoneInfo)

    def next_occurrence(self) -> datetime:
        """Return the first occurrence after now; `ValueError` if there is none."""
        return self.next_after(datetime.now(UTC))

    def next_after(self, moment: datetime) -> datetime:
        """Return the first occurrence strictly after `moment`; `ValueError` if there is none."""
        moment = _utc(moment)
        aware = self._start.tzinfo is not None
        found = self._parse(self._start_near(moment)).after(moment if aware else moment.replace(tzinfo=None))
        if found is None:
            hint = ": COUNT counts from DTSTART, and the rule has none" if self.counts_from_nowhere else ""
            raise ValueError(f"{self!r} has no occurrence after {moment.isoformat()}{hint}")
        return found.astimezone(UTC) if aware else found.replace(tzinfo=UTC)

    def _start_near(self, moment: datetime) -> datetime:
        """Return a start of the same phase shortly before `moment`.

        dateutil walks through every occurrence since DTSTART; for a rule by the minute that is millions.
        """
        step = _FIXED_STEPS.get(self._parameters.get("FREQ", ""))
        if step is None or "COUNT" in self._parameters or self._body.upper().count("FREQ=") != 1:
            return self._start
        step *= int(self._parameters.get("INTERVAL", "1"))
        here = moment.astimezone(self._start.tzinfo or UTC).replace(tzinfo=self._start.tzinfo)
        # Arithmetic within one zone is by the wall clock: leave room for the changes of that clock.
        slack = timedelta(days=1) if self._start.tzinfo else timedelta(0)
        # One step back, because BYSETPOS may see only a part of the period that holds the start.
        whole_steps = (here - self._start - slack) // step - 1
        return self._start + max(0, whole_steps) * step

    @property
    def fingerprint(self) -> str:
        """`rrule:` and the rule on one line, with the zone where one was given."""
        zone = f"@{self.timezone}" if self.timezone is not None else ""
        return f"rrule{zone}:{' '.join(self.rule.split())}"

    def __repr__(self) -> str:
        zone = f", timezone={self.timezone!r}" if self.timezone is not None else ""
        return f"RRuleSchedule({self.rule!r}{zone})"


def _split_dtstart(rule: str, zone: ZoneInfo | None) -> tuple[datetime, str]:
    """Return the start (naive means UTC) and the rule without its DTSTART; `zone` is for one that has none."""
    found = _DTSTART.search(rule)
    if found is None:
        return RRULE_ANCHOR.replace(tzinfo=zone), rule.strip()
    from dateutil.parser import isoparse

    parameters = dict(part.split("=", 1) for part in found[1].upper().split(";") if "=" in part)
    start = isoparse(found[2])
    if zone is not None and ("TZID" in parameters or start.tzinfo is not None):
        raise ValueError("its DTSTART has a time zone already: leave out the other one")
    if "TZID" in parameters:
        # Zone names are case sensitive: take it from the text as it was written.
        name = re.split(r"TZID=", found[1], flags=re.IGNORECASE)[1].split(";")[0]
        own = _zone(name)
        start = start.astimezone(own) if start.tzinfo else start.replace(tzinfo=own)
    elif start.tzinfo is not None:
        start = start.astimezone(UTC).replace(tzinfo=None)
    elif zone is not None:
        start = start.replace(tzinfo=zone)
    return start, (rule[: found.start()] + rule[found.end() :]).strip()


def _parameters(body: str) -> dict[str, str]:
    """Return the parts that are looked at here, by name."""
    return dict(re.findall(r"(FREQ|INTERVAL|COUNT|UNTIL)=([^;\s]*)", body.upper()))


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (LookupError, ValueError, OSError) as exc:
        raise ValueError(f"unknown time zone {name!r}: give an IANA name such as 'Europe/Zurich'") from exc


def _utc(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise ValueError(f"{moment.isoformat()} has no time zone: pass an aware datetime")
    return moment.astimezone(UTC)
