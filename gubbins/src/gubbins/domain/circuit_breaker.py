"""Circuit breakers of calls to compute elements."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any


class CECall(StrEnum):
    """Kind of call to a compute element; each has a circuit of its own."""

    SUBMIT = "submit"
    STATUS = "status"  # polling and cancelling


class CircuitState(StrEnum):
    """State of a circuit breaker."""

    CLOSED = "closed"  # calls are made
    OPEN = "open"  # no calls until the end of the pause
    HALF_OPEN = "half-open"  # one call at a time, as a probe


@dataclass(frozen=True, slots=True)
class Circuit:
    """Circuit of one kind of call to one compute element."""

    failures: int = 0  # consecutive
    open_until: datetime | None = None
    probe_until: datetime | None = None  # expiry of the current probe
    last_error: str | None = None
    last_error_at: datetime | None = None

    def state(self, now: datetime) -> CircuitState:
        if self.open_until is None:
            return CircuitState.CLOSED
        return CircuitState.OPEN if now < self.open_until else CircuitState.HALF_OPEN

    def as_dict(self, now: datetime) -> dict[str, Any]:
        """Fields for users."""
        return {
            "state": self.state(now),
            "failures": self.failures,
            "open_until": self.open_until,
            "last_error": self.last_error,
            "last_error_at": self.last_error_at,
        }
