"""Read models, health checks, audited actions and metrics for operators.

Lists are paginated: pass `after` of a page to get the next one. Functions raise `ValueError` for an invalid cursor
and for an unknown queue, lock, window or reason, `RedisError` if the server fails, and `UnreadableKeyError` for
keys that were not written by this version. A `registry` provides the names of arguments and which of them are
secret.
"""

from __future__ import annotations

from ..plumbing.broker.groups import list_groups as groups
from ..plumbing.broker.requests import LockKind
from .dead_letters import waiting_dead_letters
from .locks import lock, locks, release_lock
from .models import (
    BlockedLoop,
    DelayedTask,
    DelayReason,
    Distribution,
    Failure,
    Holder,
    Lock,
    Page,
    Point,
    Queue,
    QueuedTask,
    Released,
    RunningTask,
    Snapshot,
    TaskRecord,
    TaskStats,
    WaitingDeadLetter,
    Window,
    Worker,
    as_json,
)
from .processes import running, workers
from .queued import delayed, peek, purge, queues, snapshot
from .statistics import failed_task_names, failures, history, stats

__all__ = [
    "BlockedLoop",
    "DelayReason",
    "DelayedTask",
    "Distribution",
    "Failure",
    "Holder",
    "Lock",
    "LockKind",
    "Page",
    "Point",
    "Queue",
    "QueuedTask",
    "Released",
    "RunningTask",
    "Snapshot",
    "TaskRecord",
    "TaskStats",
    "WaitingDeadLetter",
    "Window",
    "Worker",
    "as_json",
    "delayed",
    "failed_task_names",
    "failures",
    "groups",
    "history",
    "lock",
    "locks",
    "peek",
    "purge",
    "queues",
    "release_lock",
    "running",
    "snapshot",
    "stats",
    "waiting_dead_letters",
    "workers",
]
