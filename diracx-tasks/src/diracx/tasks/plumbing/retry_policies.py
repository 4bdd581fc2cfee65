"""Retry policies: whether a failed task runs again, and when.

A policy sees the exception that was raised. What it does not decide: `StopRetryingError` ends the retries
and `TaskRetryRequestedError` asks for one before any policy is consulted; that is the worker's part.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from datetime import UTC, datetime, timedelta
from math import ldexp

from pydantic import BaseModel, ConfigDict, Field

#: No retry waits longer than this; past some dozens of doublings a delay would leave the calendar.
MAX_DELAY = timedelta(days=3650)


class RetryPolicyBase(BaseModel, ABC):
    """Derive from it to write a policy of your own; its fields are its settings."""

    model_config = ConfigDict(extra="forbid")

    @abstractmethod
    def schedule_retry(self, attempt: int, exception: Exception) -> datetime | None:
        """Return when to run again (aware, UTC), or None to give up.

        Work it out from this machine's clock: what is left until then counts as a delay by the server's clock.
        `attempt` is the number of retries already made: 0 at the first failure. `exception` is what the
        task raised.
        """


class NoRetry(RetryPolicyBase):
    """Never run again. The default."""

    def schedule_retry(self, attempt: int, exception: Exception) -> datetime | None:
        """Return None."""
        return None


class ExponentialBackoff(RetryPolicyBase):
    """Run again after `base_delay_seconds`, then after twice as long each time, `max_retries` times."""

    #: Seconds before the first retry.
    base_delay_seconds: float = Field(default=10, ge=0, allow_inf_nan=False)
    #: How many retries are made before the task is given up.
    max_retries: int = Field(default=5, ge=0)

    def schedule_retry(self, attempt: int, exception: Exception) -> datetime | None:
        """Return now + `base_delay_seconds` * 2**`attempt`, or None once `max_retries` retries were made."""
        if attempt >= self.max_retries:
            return None
        return datetime.now(UTC) + self._delay(attempt)

    def _delay(self, attempt: int) -> timedelta:
        try:
            return min(timedelta(seconds=ldexp(self.base_delay_seconds, attempt)), MAX_DELAY)
        except OverflowError:
            return MAX_DELAY
