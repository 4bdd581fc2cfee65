"""Views and actions of operators: read models, health checks, audited actions and metrics."""

from __future__ import annotations

from ..plumbing._util.secrets import MASK
from ..plumbing.broker.groups import list_groups as groups
from .actions import purge, release_lock
from .dead_letters import waiting_dead_letters
from .locks import lock, locks
from .masking import masked_arguments
from .models import (
    DELAY_REASONS,
    BlockedLoop,
    DelayedTask,
    DelayReason,
    Distribution,
    Failure,
    Holder,
    Lock,
    LockKind,
    Page,
    Point,
    Queue,
    QueuedTask,
    Released,
    RunningTask,
    Snapshot,
    TaskStats,
    WaitingDeadLetter,
    Window,
    Worker,
    as_json,
)
from .processes import running, workers
from .queued import delayed, peek, queues, snapshot
from .statistics import failed_task_names, failures, history, stats

__all__ = [
    "DELAY_REASONS",
    "MASK",
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
    "masked_arguments",
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
