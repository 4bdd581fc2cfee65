"""Retry policies, and exceptions of a task."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from diracx.tasks.plumbing import (
    BaseTask,
    ExponentialBackoff,
    RetryPolicyBase,
    TaskRetryRequestedError,
    UnretryableError,
)


class OnlyWhenBusy(RetryPolicyBase):
    """Try again in half a second, but only after a `ConnectionError`."""

    max_retries: int = 3

    def schedule_retry(self, attempt: int, exception: Exception) -> datetime | None:
        if attempt >= self.max_retries or not isinstance(exception, ConnectionError):
            return None
        return datetime.now(UTC) + timedelta(seconds=0.5)


@dataclass
class Fetch(BaseTask):
    """Retried after 10 s, 20 s, 40 s, 80 s and 160 s, then kept as a dead letter."""

    url: str

    retry_policy = ExponentialBackoff(base_delay_seconds=10, max_retries=5)
    dlq_eligible = True

    async def execute(self) -> None:
        raise ConnectionError(self.url)


@dataclass
class Ask(BaseTask):
    status: int

    retry_policy = OnlyWhenBusy()

    async def execute(self) -> str:
        match self.status:
            case 200:
                return "fine"
            case 404:
                raise UnretryableError("it is not there, and will not be there tomorrow")
            case 429:
                raise TaskRetryRequestedError("asked to come back later")
            case _:
                raise ConnectionError(f"status {self.status}")
