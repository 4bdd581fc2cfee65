"""Read models for operators: data classes that convert to JSON."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from datetime import datetime
from math import isfinite
from typing import Any, Generic, Literal, TypeVar

from ..plumbing.broker.requests import LOCK_KINDS, LockKind
from ..plumbing.broker.stored import printable

_Item = TypeVar("_Item")

#: Reason for which a task is delayed.
DelayReason = Literal["at_time", "retry", "lock", "rate"]
DELAY_REASONS: tuple[DelayReason, ...] = ("at_time", "retry", "lock", "rate")
Window = Literal["hour", "day"]


#: Python refuses to convert longer integers to decimal text.
_MOST_BITS = 10_000


def as_json(value: Any) -> Any:
    """Convert a value to JSON types: times to ISO 8601, other values without a JSON type to text."""
    shown: Any
    if value is None or isinstance(value, bool) or (isinstance(value, float) and isfinite(value)):
        shown = value
    elif isinstance(value, str):
        shown = printable(value)
    elif isinstance(value, int):
        shown = value if value.bit_length() <= _MOST_BITS else hex(value)
    elif is_dataclass(value) and not isinstance(value, type):
        shown = {each.name: as_json(getattr(value, each.name)) for each in fields(value)}
    elif isinstance(value, datetime):
        shown = value.isoformat(timespec="milliseconds")
    elif isinstance(value, dict):
        shown = {str(as_json(name)): as_json(each) for name, each in value.items()}
    elif isinstance(value, list | tuple | set | frozenset):
        shown = [as_json(each) for each in value]
    else:
        shown = value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)
    return shown


class ReadModel:
    """Base of all read models."""

    __slots__ = ()

    def as_json(self) -> dict[str, Any]:
        """Return all fields for `json.dumps`."""
        shown: dict[str, Any] = as_json(self)
        return shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(ReadModel, Generic[_Item]):
    """One page of a list."""

    items: list[_Item]
    after: str | None = field(
        default=None, metadata={"description": "Cursor of the next page; null: this is the last one."}
    )
    """None: this is the last page. A page may be empty and not the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue(ReadModel):
    """One of the nine queues."""

    name: str
    """`{priority}:{size}`."""
    priority: str
    size: str
    backlog: int
    """Tasks that wait for a worker."""
    running: int
    """Tasks delivered to workers."""
    oldest_waiting_seconds: float | None
    """Waiting time of the first task; None without a backlog."""
    in_per_second: float | None
    """Rate of new tasks, retries and tasks that became due, over the last minutes; None if no worker reports."""
    out_per_second: float | None
    """Rate of executions that ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockedLoop(ReadModel):
    """Event loop of a worker that is blocked by a task."""

    since: datetime
    task_id: str | None
    """None if it is not known which of several tasks blocks."""
    task_name: str | None
    stack: str
    """Innermost frames of the blocked thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker(ReadModel):
    """A worker process. Fields with a default come from its reports, and are None before the first one."""

    name: str
    """`{host}:{pid}:{random}`."""
    host: str
    pid: int
    alive: bool
    """True if its lease has not expired."""
    lease_until: datetime | None
    size: str | None = None
    slots: int | None = None
    slots_used: int | None = None
    started: datetime | None = None
    memory_bytes: int | None = None
    """Resident memory of the process."""
    version: str | None = None
    """Version of diracx-tasks."""
    seen: datetime | None = None
    """Time of its last report; workers report every 5 s, or every 50 s while nothing changes."""
    blocked: BlockedLoop | None = None
    """None unless its event loop is blocked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRecord(ReadModel):
    """A task, with the parts of its message that lists read: its first 64 KiB."""

    task_id: str
    task_name: str
    """Name and id are empty if the message cannot be decoded."""
    vo: str | None = None
    """None: it belongs to no VO, or to an unknown one, as the message is larger or cannot be decoded."""
    arguments: dict[str, Any] | None = None
    """Masked, by name; None if the message is larger, cannot be decoded, or was deleted with its task."""
    message_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningTask(TaskRecord):
    """A running task, as last reported by its worker."""

    queue: str
    """`{priority}:{size}`."""
    attempt: int
    """1 for the first."""
    deliveries: int
    """Number of deliveries; more than one means that a worker crashed with it."""
    since: datetime
    worker: str
    blocks_worker: bool = False
    """True if it blocks the event loop of its worker."""
    locks: list[str] = field(default_factory=list)
    """Redis keys of the locks it holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DelayedTask(TaskRecord):
    """A task that waits for a time, a retry, a lock or quota."""

    queue: str
    reason: DelayReason
    due: datetime
    """Time of its promotion, or of the next poll of the lock that it waits for; a release grants it earlier."""
    waiting_since: datetime | None
    """Time at which it was first refused a lock."""
    lock: str | None
    """Redis key of the lock that it waits for, for the reasons `lock` and `rate`."""
    failed_attempts: int | None = 0
    """None if its labels have more than 64 KiB."""
    last_error: str | None = None
    """Type and message of the last failed attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedTask(TaskRecord):
    """A task that waits for a worker."""

    queue: str
    stream: str
    """The Redis stream: that of new tasks, or the resumed queue."""
    entry: str
    """Id of its stream entry."""
    waiting_since: datetime
    attempt: int | None = 1
    """None if its labels have more than 64 KiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder(ReadModel):
    """Holder of a lock."""

    owner: str
    """Owner id in Redis."""
    until: datetime | None = None
    """Expiry unless renewed; None for readers and mutexes (see `Lock.expires`)."""
    worker: str | None = None
    """None if the lock is held outside the task system."""
    task_id: str | None = None
    """None as well until its worker has reported the task (5 s)."""
    task_name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock(ReadModel):
    """A lock or limiter with its holders and waiters."""

    key: str
    """The Redis key."""
    kind: LockKind
    """`shared` or `exclusive`: a readers-writer lock that is held by readers or a writer."""
    held: int
    """Number of holders; of a rate limiter, units of quota used within the window."""
    waiters: int
    """Number of tasks that wait for it."""
    holders: list[Holder] = field(default_factory=list)
    """At most 100 holders; empty for a rate limiter."""
    limit: int | None = None
    """Limit of a limiter, as of the last task that used it; None if not used lately."""
    window_seconds: float | None = None
    """Window of a rate limiter."""
    expires: datetime | None = None
    """Expiry unless renewed; None: never, or it is not held."""

    @property
    def is_quota(self) -> bool:
        """True if it has no holders, and what was used can only be reset."""
        return LOCK_KINDS[self.kind].is_quota


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution(ReadModel):
    """Distribution of times, from a logarithmic histogram: percentiles are at most 19 % too high."""

    count: int
    mean_seconds: float | None
    p50_seconds: float | None
    p95_seconds: float | None
    p99_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStats(ReadModel):
    """Statistics of a task class over the last hour or day."""

    task_name: str
    done: int
    """Executions that succeeded."""
    failed: int
    """Attempts that failed."""
    retried: int
    """Failed attempts that were retried."""
    dead: int
    """Tasks that became dead letters."""
    failure_rate: float | None
    """Share of failed attempts, 0 to 1; None without an attempt."""
    run: Distribution
    """Run time of attempts."""
    queue: Distribution
    """Time from submission or due time to the start of the attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure(ReadModel):
    """A failed attempt."""

    id: str
    at: datetime
    task_id: str
    task_name: str
    vo: str | None
    type: str
    message: str
    traceback: str
    """Innermost frames of the traceback."""
    attempt: int
    worker: str
    outcome: str
    """`retried`, `dead` (a dead letter), `dropped`, `cancelled`; later versions may have others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingDeadLetter(TaskRecord):
    """A dead letter in Redis that no worker has stored in the database yet. `message_bytes` is its own size."""

    entry: str
    """Id of its stream entry."""
    buried: datetime
    reason: str
    detail: str
    """One line about the last error."""
    failed_attempts: int | None
    """None if the dead letter has more than 64 KiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point(ReadModel):
    """Counters of one minute of the past hour, over all queues."""

    at: datetime
    """Start of the minute."""
    submitted: int | None
    """Tasks submitted to queues, averaged over the minutes between two reports; None where one is missing."""
    done: int
    failed: int
    backlog: int | None
    """Tasks queued and running at its start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot(ReadModel):
    """The whole system at one moment."""

    at: datetime
    """By the server's clock."""
    queues: list[Queue]
    """All nine, most urgent first."""
    workers: list[Worker]
    delayed: dict[str, int]
    """Number of tasks by reason: `at_time`, `retry`, `lock`, `rate`."""
    overdue: int
    """Delayed tasks whose promotion is more than 10 s overdue."""
    schedules: int
    """Schedules with a next run."""
    schedules_late: int
    """Schedules that are not paused and whose next run is more than 10 s overdue."""
    schedule_lateness_seconds: float
    """Maximum delay of a schedule."""
    delayed_lateness_seconds: float
    """Maximum delay of a delayed task."""
    scheduler_leads: bool
    """True if there is a leading scheduler."""
    groups: int
    """Number of pending callback groups."""
    groups_stuck: int
    """Groups without progress for a day, or failed without an `on_failure` callback."""
    dead_letters_waiting: int
    """Dead letters in Redis that no worker has stored in the database yet."""
    dead_letters_waiting_since: datetime | None
    """Time of the first of them."""
    memory_bytes: int | None
    """Memory used by the server; None if the Redis user may not read it."""
    memory_limit_bytes: int | None
    """None: no limit is set."""
    memory_policy: str | None = None
    """`maxmemory-policy`; any but `noeviction` may lose tasks. None if the Redis user may not read it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Released(ReadModel):
    """Result of `release_lock`."""

    key: str
    released: int
    """Number of released holders; of a rate limiter, units of quota."""
    hit: list[Holder] = field(default_factory=list)
    """Holders that lost the lock. Tasks among them are cancelled at the next renewal, and count as failed."""
