"""A clock controlled by a test."""

from __future__ import annotations

from datetime import UTC, datetime


class Clock:
    """Stands still between the moves of a test."""

    def __init__(self) -> None:
        self.at = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.at
