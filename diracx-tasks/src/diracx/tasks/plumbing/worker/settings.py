"""Settings of a worker."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from ..broker.labels import LONGEST_TTL_SECONDS
from ..broker.sizes import MAX_BYTES

#: As long as the server keeps the time of the last renewal.
LONGEST_LEASE_SECONDS = 86_400


class WorkerSettings(BaseModel):
    """Settings of a worker. All times are in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_concurrent_tasks: int = Field(default=10, ge=1)
    """Slots: the number of tasks that run at a time."""
    lease_seconds: float = Field(default=30.0, gt=0, le=LONGEST_LEASE_SECONDS)
    """Time without a renewal after which other workers reclaim the tasks of the worker."""
    max_deliveries: int = Field(default=3, ge=1)
    """A task that has lost this many workers is poison: it becomes a dead letter."""
    grace_seconds: float = Field(default=30.0, ge=0)
    """Time for which running tasks may go on after the first stop signal."""
    hard_limit_seconds: float | None = Field(default=None, gt=0)
    """An execution that ignores its cancellation for this time ends the process; None: never."""
    report_overdue_seconds: float = Field(default=10.0, gt=0)
    """An execution that ignores its cancellation for this time is reported and cancelled again."""
    report_blocked_seconds: float = Field(default=5.0, gt=0)
    """A task that blocks the event loop for this time is reported, with the stack of its thread."""
    result_ttl_seconds: int | None = Field(default=None, ge=1, le=LONGEST_TTL_SECONDS)
    """Keep the results of all tasks for this time; None: only of tasks submitted with that label."""
    max_result_bytes: int = Field(default=MAX_BYTES, ge=100_000)
    """A larger result is replaced by an error; the task still counts as succeeded."""
    lock_retry_seconds: float = Field(default=10.0, gt=0)
    """Time after which the first task parked for a lock tries again, if the lock was not granted to it before."""
    housekeeping_seconds: float = Field(default=60.0, gt=0)
    """Interval of the polls for delayed tasks that no scheduler has promoted."""
    max_queued_dead_letters: int = Field(default=1_000, ge=0)
    """Dead letters that wait in memory for the database, with their tasks unacknowledged and their locks held."""
    dead_letter_seconds: float = Field(default=30.0, gt=0)
    """Time for which they wait there; after it, they are stored in Redis."""
    database_answer_seconds: float = Field(default=10.0, gt=0)
    """Timeout of the database of dead letters: after it, a new connection is tried."""
    import_seconds: float = Field(default=60.0, gt=0)
    """Interval of the imports of dead letters from Redis."""
