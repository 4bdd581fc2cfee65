"""The numbers of a worker."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from ..broker.sizes import MAX_BYTES


class WorkerSettings(BaseModel):
    """Settings of a worker. All times are in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_concurrent_tasks: int = Field(default=10, ge=1)
    """Slots: how many tasks run at a time."""
    lease_seconds: float = Field(default=30.0, gt=0)
    """Time for which a worker may be silent before others take over what it runs."""
    max_deliveries: int = Field(default=3, ge=1)
    """A task that was handed out more often than this has killed its workers: it is poison."""
    grace_seconds: float = Field(default=30.0, ge=0)
    """Time for which running tasks may go on after the first stop signal."""
    hard_limit_seconds: float | None = Field(default=None, gt=0)
    """An execution that ignores its cancellation for so long ends the process; None: it never does."""
    report_overdue_seconds: float = Field(default=10.0, gt=0)
    """An execution that ignores its cancellation for so long is reported and cancelled once more."""
    report_blocked_seconds: float = Field(default=5.0, gt=0)
    """A task that blocks the event loop for so long is reported, with the stack of its thread."""
    result_ttl_seconds: int | None = Field(default=None, ge=1)
    """Keep the results of all tasks for so long; None: only of those submitted with that label."""
    max_result_bytes: int = Field(default=MAX_BYTES, ge=100_000)
    """Of a result that is larger, only that is kept that it was; the task has succeeded all the same."""
    lock_retry_seconds: float = Field(default=10.0, gt=0)
    """Time for which the first in line for a lock waits at most, should nobody give the lock back."""
    housekeeping_seconds: float = Field(default=60.0, gt=0)
    """Interval at which it looks for delayed tasks that no scheduler has promoted."""
