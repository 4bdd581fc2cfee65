"""Read models for operators: plain values, each with its unit, and each of them as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from datetime import datetime
from math import isfinite
from typing import Any, Generic, Literal, TypeVar

from ..plumbing.broker.stored import printable

_Item = TypeVar("_Item")

#: Why a task is not in its queue.
DelayReason = Literal["at_time", "retry", "lock", "rate"]
DELAY_REASONS: tuple[DelayReason, ...] = ("at_time", "retry", "lock", "rate")
LockKind = Literal["mutex", "exclusive", "shared", "concurrency", "rate"]
Window = Literal["hour", "day"]


#: Python refuses to write longer numbers in decimal digits, for that takes long.
_MOST_BITS = 10_000


def as_json(value: Any) -> Any:
    """A value of this package as JSON has it: moments are ISO 8601, what JSON does not know is text."""
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


class Shown:
    """Base of all read models."""

    __slots__ = ()

    def as_json(self) -> dict[str, Any]:
        """All fields, for `json.dumps`."""
        shown: dict[str, Any] = as_json(self)
        return shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Shown, Generic[_Item]):
    """A part of a list."""

    items: list[_Item]
    after: str | None = None
    """To be given for the next page; None: this was the last one. A page may be empty and not the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue(Shown):
    """One of the nine queues."""

    name: str
    """`{priority}:{size}`."""
    priority: str
    size: str
    backlog: int
    """Tasks that could run and wait for a worker."""
    running: int
    """Tasks in the hands of workers."""
    oldest_waiting_seconds: float | None
    """For how long the first of the backlog has been waiting; None without a backlog."""
    in_per_second: float | None
    """New tasks, retries and tasks that became due, over the last minutes; None when no worker reports."""
    out_per_second: float | None
    """Executions that ended, likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockedLoop(Shown):
    """An event loop that a task blocks: nothing else of its worker goes on."""

    since: datetime
    task_id: str | None
    """None where it is not known which of several tasks it is; the stack says where it is."""
    task_name: str | None
    stack: str
    """Of the blocked thread, its end: as in a traceback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker(Shown):
    """A worker process. What only a report can tell is None before the first one."""

    name: str
    """`{host}:{pid}:{random}`."""
    host: str
    pid: int
    alive: bool
    """True if its lease holds."""
    lease_until: datetime | None
    size: str | None = None
    slots: int | None = None
    slots_used: int | None = None
    started: datetime | None = None
    memory_bytes: int | None = None
    """Resident memory of the process."""
    version: str | None = None
    """Of diracx-tasks."""
    seen: datetime | None = None
    """Its last report; workers report every 5 s."""
    blocked: BlockedLoop | None = None
    """Code that blocks its event loop; None: nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningTask(Shown):
    """An execution, as its worker reported it within the last seconds."""

    task_id: str
    task_name: str
    vo: str | None
    queue: str
    """`{priority}:{size}`."""
    attempt: int
    """1 for the first."""
    deliveries: int
    """Number of deliveries: more than one means that a worker died with it."""
    since: datetime
    worker: str
    blocks_worker: bool = False
    """True if it blocks the event loop of its worker."""
    locks: list[str] = field(default_factory=list)
    """Redis keys of the locks it holds."""
    arguments: dict[str, Any] | None = None
    """Masked; None when the task has ended meanwhile, or its message has more than 64 KiB."""
    message_bytes: int | None = None
    """Size of its message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DelayedTask(Shown):
    """A task that is delayed: until a time, for a retry, or because a lock is not to be had."""

    task_id: str
    task_name: str
    queue: str
    reason: DelayReason
    due: datetime
    """Time when it is looked at again, or the line of its lock; a lock that is given back brings it sooner."""
    waiting_since: datetime | None
    """Time when it was first refused by a lock."""
    lock: str | None
    """The lock that refused it (Redis key), for the reasons `lock` and `rate`."""
    failed_attempts: int | None = 0
    """None when its labels alone have more than 64 KiB."""
    last_error: str | None = None
    """Type and message of the last failed attempt."""
    arguments: dict[str, Any] | None = None
    """Masked; None when its message has more than 64 KiB, or is none."""
    message_bytes: int = 0
    """Size of its message."""
    vo: str | None = None
    """None where its message has more than 64 KiB, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedTask(Shown):
    """A task that waits for a worker."""

    task_id: str
    """Empty for an entry that is no task."""
    task_name: str
    queue: str
    stream: str
    """The Redis stream: that of new tasks, or that of those whose turn has come."""
    entry: str
    """Id of its stream entry."""
    waiting_since: datetime
    attempt: int | None = 1
    """None when its labels alone have more than 64 KiB."""
    arguments: dict[str, Any] | None = None
    """Masked; None when its message has more than 64 KiB, or is none."""
    message_bytes: int = 0
    """Size of its message."""
    vo: str | None = None
    """None where its message has more than 64 KiB, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder(Shown):
    """Holder of a lock."""

    owner: str
    """The name under which it is held."""
    until: datetime | None = None
    """Time when it ends unless it is renewed; None for a reader, and with a mutex: see `Lock.expires`."""
    worker: str | None = None
    """None for a lock that is held outside the task system."""
    task_id: str | None = None
    """None as well until its worker has reported the task (5 s)."""
    task_name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock(Shown):
    """A lock or limiter, and who has to do with it."""

    key: str
    """The Redis key."""
    kind: LockKind
    """`shared` for a readers-writer lock that is read, `exclusive` for one that is written."""
    held: int
    """Number of holders; with a rate limiter, units of quota spent within the window."""
    waiters: int
    """Tasks in line for it."""
    holders: list[Holder] = field(default_factory=list)
    """At most 100 of them; none for a rate limiter, whose quota nobody holds."""
    limit: int | None = None
    """Of a limiter, as the last task that asked for it knew it; None when none did lately."""
    window_seconds: float | None = None
    """Of a rate limiter."""
    expires: datetime | None = None
    """Time when it ends by itself unless it is renewed; None: never, or it is not held."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution(Shown):
    """Times, from a histogram of logarithmic buckets: a percentile is at most 19 % too high."""

    count: int
    mean_seconds: float | None
    p50_seconds: float | None
    p95_seconds: float | None
    p99_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStats(Shown):
    """Statistics of a class of tasks over the last hour or day."""

    task_name: str
    done: int
    """Executions that succeeded."""
    failed: int
    """Attempts that failed."""
    retried: int
    """Failed attempts that are followed by another one."""
    dead: int
    """Tasks that were put with the dead letters."""
    failure_rate: float | None
    """Failed attempts by all attempts, 0 to 1; None without an attempt."""
    run: Distribution
    """Run time of attempts."""
    queue: Distribution
    """Time from submission (or from when it was due) to the beginning of the attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure(Shown):
    """A failed attempt."""

    id: str
    """Also the place to read on from."""
    at: datetime
    task_id: str
    task_name: str
    vo: str | None
    type: str
    message: str
    traceback: str
    """Its end, shortened."""
    attempt: int
    worker: str
    outcome: Literal["retried", "dead", "dropped", "cancelled"]
    """Outcome for the task: `dead` is with the dead letters, `dropped` is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingDeadLetter(Shown):
    """A dead letter that waits in Redis until a worker with a database takes it."""

    entry: str
    """Also the place to read on from."""
    buried: datetime
    task_id: str
    task_name: str
    """Empty when the message could not be read."""
    reason: str
    detail: str
    """One line about the last error."""
    failed_attempts: int | None
    """None when the dead letter has more than 64 KiB."""
    arguments: dict[str, Any] | None
    """By name, secret ones as `•••`; None when the message could not be read, or has more than 64 KiB."""
    message_bytes: int = 0
    """Size of the dead letter."""
    vo: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Point(Shown):
    """A minute of the past hour, over all queues."""

    at: datetime
    """Its beginning."""
    submitted: int | None
    """Entries into queues; None when nobody reported at its beginning and at its end."""
    done: int
    failed: int
    backlog: int | None
    """Queued and running at its beginning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot(Shown):
    """The whole system at one moment."""

    at: datetime
    """By the server's clock."""
    queues: list[Queue]
    """All nine, most urgent first."""
    workers: list[Worker]
    delayed: dict[str, int]
    """Number of tasks by reason: `at_time`, `retry`, `lock`, `rate`."""
    overdue: int
    """Delayed tasks that should have been moved to their queue more than 10 s ago: nobody does it."""
    schedules: int
    """Schedules with a next run."""
    schedules_late: int
    """Schedules whose next run is more than 10 s overdue, and that are not paused: no scheduler works."""
    schedule_lateness_seconds: float
    """Delay of the run of the schedule that is most overdue at the moment."""
    delayed_lateness_seconds: float
    """The same of delayed tasks."""
    scheduler_leads: bool
    """True if there is a leading scheduler."""
    groups: int
    """Callback groups that have not called back."""
    groups_stuck: int
    """Groups of which no child has ended for a day, or that have failed without a callback for that."""
    dead_letters_waiting: int
    """Dead letters in Redis, that wait for a worker with a database."""
    dead_letters_waiting_since: datetime | None
    """Time when the first of them came."""
    memory_bytes: int | None
    """Used by the server; None where its user may not ask."""
    memory_limit_bytes: int | None
    """None: no limit is set."""
    memory_policy: str | None = None
    """`maxmemory-policy` of the server; any but `noeviction` loses tasks. None where its user may not ask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Released(Shown):
    """Result of `release_lock`."""

    key: str
    released: int
    """Holds that were given back; with a rate limiter, units of quota."""
    hit: list[Holder] = field(default_factory=list)
    """Holders that lost it. A task among them is cancelled when its worker next renews its locks, and counts as
    failed."""
