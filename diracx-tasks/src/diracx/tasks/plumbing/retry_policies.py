"""Retry policies decide whether a failed task runs again, and when.

The worker handles `StopRetryingError` and `TaskRetryRequestedError` without calling the policy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from datetime import UTC, datetime, timedelta
from math import ldexp

from pydantic import BaseModel, ConfigDict, Field

#: Maximum delay of a retry; without it, delays would overflow the calendar after some doublings.
MAX_DELAY = timedelta(days=3650)


class RetryPolicyBase(BaseModel, ABC):
    """Base class of retry policies. The fields of a policy are its settings."""

    model_config = ConfigDict(extra="forbid")

    @abstractmethod
    def schedule_retry(self, attempt: int, exception: Exception) -> datetime | None:
        """Return the time of the next attempt (aware, UTC, by the clock of this host), or None for no retry.

        `attempt` is the number of earlier retries, 0 at the first failure; `exception` is that of the task.
        """


class NoRetry(RetryPolicyBase):
    """No retries. The default."""

    def schedule_retry(self, attempt: int, exception: Exception) -> datetime | None:
        """Return None."""
        return None


class ExponentialBackoff(RetryPolicyBase):
    """Retries after `base_delay_seconds`, doubled for each further one, at most `max_retries` times."""

    #: Delay of the first retry.
    base_delay_seconds: float = Field(default=10, ge=0, allow_inf_nan=False)
    #: Maximum number of retries.
    max_retries: int = Field(default=5, ge=0)

    def schedule_retry(self, attempt: int, exception: Exception) -> datetime | None:
        """Return now + `base_delay_seconds` * 2**`attempt`, or None once `max_retries` retries were made."""
        if attempt >= self.max_retries:
            return None
        try:
            delay = min(timedelta(seconds=ldexp(self.base_delay_seconds, attempt)), MAX_DELAY)
        except OverflowError:
            delay = MAX_DELAY
        return datetime.now(UTC) + delay
