"""Downtimes of compute elements: periods without submissions and alerts."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pydantic import ConfigDict

from .exceptions import CEPausedError

MAX_DOWNTIME = timedelta(days=366)


@dataclass(frozen=True, slots=True)
class Downtime:
    """A downtime of a compute element. All times are UTC."""

    __pydantic_config__ = ConfigDict(
        use_attribute_docstrings=True,
        json_schema_extra={
            "examples": [
                {
                    "id": 7,
                    "ce_name": "ce01.example.org",
                    "starts_at": "2026-12-01T08:00:00Z",
                    "ends_at": "2026-12-01T18:00:00Z",
                    "drain_from": "2026-11-30T08:00:00Z",
                    "reason": "new switches",
                    "added_by": "operator alice",
                    "source": None,
                }
            ]
        },
    )

    id: int
    ce_name: str
    starts_at: datetime
    ends_at: datetime
    drain_from: datetime
    """Start of the time without submissions."""
    reason: str
    added_by: str
    source: str | None
    """Origin of an imported downtime; null: added by a user."""

    def describe(self, now: datetime) -> str:
        """Describe the downtime as the reason for no submissions."""
        start, end = (f"{moment:%Y-%m-%d %H:%M} UTC" for moment in (self.starts_at, self.ends_at))
        if now < self.starts_at:
            return f"drained for its downtime from {start} to {end}: {self.reason}"
        return f"in downtime until {end}: {self.reason}"

    def blocker(self, now: datetime) -> CEPausedError:
        """Make the error of a submission."""
        remedy = f"`gubbins ce downtime remove {self.id}` ends it"
        return CEPausedError(self.ce_name, self.describe(now), remedy=remedy)


def parse_moment(text: str) -> datetime:
    """Parse a time in ISO 8601 (`2026-12-01T08:00`, `2026-12-01T08:00+01:00`); UTC by default.

    Raises:
        ValueError: the text is not a time.
    """
    try:
        moment = datetime.fromisoformat(text.strip())
        return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"{text[:40]!r} is no time like 2026-12-01T08:00 (UTC) or 2026-12-01T08:00+01:00"
        ) from error


def downtime_error(starts_at: datetime, ends_at: datetime, drain: timedelta, now: datetime) -> str | None:
    """Describe the error in the times of a downtime; None: they are valid."""
    if ends_at <= starts_at:
        return "a downtime must end after its start"
    if ends_at <= now:
        return "this downtime is over already: its end must be in the future"
    if ends_at - starts_at > MAX_DOWNTIME or starts_at - now > MAX_DOWNTIME:
        return f"a downtime starts within {MAX_DOWNTIME.days} days, and is no longer than that"
    if not timedelta() <= drain <= MAX_DOWNTIME:
        return f"pilots can be drained for 0 seconds to {MAX_DOWNTIME.days} days before"
    return None
