"""Downtimes of compute elements: planned times without new pilots and without alarms."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

MAX_DOWNTIME = timedelta(days=366)


@dataclass(frozen=True, slots=True)
class Downtime:
    """A downtime of one compute element."""

    id: int
    ce_name: str
    starts_at: datetime
    ends_at: datetime
    drain_from: datetime
    """No pilots are submitted from then on; not after `starts_at`."""
    reason: str
    added_by: str
    source: str | None = None
    """Origin of an imported one; None: a user has added it."""

    def describe(self, now: datetime) -> str:
        """The downtime as a reason why there are no pilots."""
        start, end = (f"{moment:%Y-%m-%d %H:%M} UTC" for moment in (self.starts_at, self.ends_at))
        if now < self.starts_at:
            return f"drained for its downtime from {start} to {end}: {self.reason}"
        return f"in downtime until {end}: {self.reason}"


def parse_moment(text: str) -> datetime:
    """A moment in ISO 8601 (`2026-12-01T08:00`, `2026-12-01T08:00+01:00`); UTC where it does not say.

    Raises:
        ValueError: it is none.
    """
    try:
        moment = datetime.fromisoformat(text.strip())
        return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"{text[:40]!r} is no time like 2026-12-01T08:00 (UTC) or 2026-12-01T08:00+01:00"
        ) from error


def problem_with(starts_at: datetime, ends_at: datetime, drain: timedelta, now: datetime) -> str | None:
    """The reason why there can be no such downtime; None: there can."""
    if ends_at <= starts_at:
        return "a downtime must end after its start"
    if ends_at <= now:
        return "this downtime is over already: its end must be in the future"
    if ends_at - starts_at > MAX_DOWNTIME or starts_at - now > MAX_DOWNTIME:
        return f"a downtime starts within {MAX_DOWNTIME.days} days, and is no longer than that"
    if not timedelta() <= drain <= MAX_DOWNTIME:
        return f"pilots can be drained for 0 seconds to {MAX_DOWNTIME.days} days before"
    return None
