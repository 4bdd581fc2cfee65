"""Views of read models: columns of tables, for terminal and dashboard."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Generic, Literal, TypeAlias, TypeVar
from urllib.parse import quote

from ..plumbing.broker.groups import GroupStatus
from ..plumbing.broker.scheduling import Outcome
from ..plumbing.broker.stored import moment_of
from ..plumbing.config.active import ActiveConfig
from ..plumbing.scheduler import ScheduleState
from . import models
from .audit import AuditEntry
from .cursors import HEAD_BYTES
from .formats import NONE, duration, number, percent, plain, remaining, since, size

_Row = TypeVar("_Row")
Kind: TypeAlias = Literal["text", "task", "id", "age", "clock", "arguments", "worker", "holders", "locks"]
_LONGEST_ARGUMENTS = 60
_LONGEST_TEXT = 80


@dataclass(frozen=True)
class Column(Generic[_Row]):
    """One column of a table."""

    title: str
    value: str | Callable[[_Row], Any]
    """Attribute or key of a row, or a function that returns the value of a row."""
    form: Callable[[Any], str] = plain
    """Formats the value as text."""
    right: bool = False
    """Align to the right, and do not wrap."""
    whole: bool = False
    """Do not wrap."""
    longest: int | None = None
    """Maximum number of characters."""
    style: Callable[[_Row], str] | None = None
    """Style of Rich; the dashboard has a CSS class for each."""
    kind: Kind = "text"
    """Format on the dashboard; `text`: as on the terminal."""
    link: Callable[[_Row], str | None] | None = None
    """Path of the dashboard page about the value."""
    detail: Callable[[_Row], str | None] | None = None
    """Longer text, such as a stack, that the dashboard can unfold."""
    meter: Callable[[_Row], tuple[float, float | None]] | None = None
    """Value and maximum (None: that of all rows) of a bar on the dashboard."""

    def raw(self, row: _Row) -> Any:
        """Return the value of a row."""
        if callable(self.value):
            return self.value(row)
        return row[self.value] if isinstance(row, Mapping) else attrgetter(self.value)(row)

    def text(self, row: _Row) -> str:
        """Return the text of a row for the terminal."""
        return self.form(self.raw(row))


@dataclass(frozen=True)
class View(Generic[_Row]):
    """A table: its columns, and the text in place of an empty one."""

    empty: str
    columns: tuple[Column[_Row], ...]


def _arguments(row: models.TaskRecord) -> str:
    if row.arguments is None:
        return f"({size(row.message_bytes)})" if (row.message_bytes or 0) > HEAD_BYTES else NONE
    return ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in row.arguments.items())


_ARGUMENTS: Column[Any] = Column("arguments", _arguments, longest=_LONGEST_ARGUMENTS, kind="arguments")


def _quoted(text: str) -> str:
    return quote(text, safe="", errors="replace")


QUEUES: View[models.Queue] = View(
    "no queues",
    (
        Column("queue", "name", whole=True, link=lambda queue: f"/queues/{_quoted(queue.name)}"),
        Column("waiting", "backlog", number, right=True, meter=lambda queue: (queue.backlog, None)),
        Column("oldest", "oldest_waiting_seconds", duration, right=True),
        Column("running", "running", number, right=True),
        Column("in/s", "in_per_second", number, right=True),
        Column("out/s", "out_per_second", number, right=True),
    ),
)


def _worker_state(worker: models.Worker) -> str:
    if not worker.alive:
        return "dead"
    if (blocked := worker.blocked) is None:
        return "alive"
    task = f"{blocked.task_name or 'a task'} {blocked.task_id or ''}".rstrip()
    return f"blocked for {since(blocked.since)} by {task}"


WORKERS: View[models.Worker] = View(
    "no worker runs; start one with `diracx-task-run worker`",
    (
        Column("worker", "name", whole=True),
        Column("size", "size"),
        Column(
            "slots in use",
            lambda worker: None if worker.slots is None else f"{worker.slots_used} of {worker.slots}",
            right=True,
            meter=lambda worker: (worker.slots_used or 0, worker.slots or 1),
        ),
        Column(
            "state",
            _worker_state,
            style=lambda worker: "green" if worker.alive and worker.blocked is None else "red",
            detail=lambda worker: worker.blocked.stack if worker.alive and worker.blocked else None,
        ),
        Column("last report", "seen", since, right=True, kind="age"),
        Column("up for", "started", since, right=True),
        Column("memory", "memory_bytes", size, right=True),
        Column("version", "version"),
    ),
)

RUNNING: View[models.RunningTask] = View(
    "nothing runs (workers report every 5 s)",
    (
        Column("task", "task_name", whole=True, kind="task"),
        Column("task id", "task_id", kind="id"),
        Column(
            "for",
            lambda task: since(task.since) + (" (blocks its worker)" if task.blocks_worker else ""),
            right=True,
            style=lambda task: "red" if task.blocks_worker else "",
            link=lambda task: "/workers" if task.blocks_worker else None,
        ),
        Column(
            "attempt",
            lambda task: f"{task.attempt} (delivery {task.deliveries})" if task.deliveries > 1 else task.attempt,
            style=lambda task: "yellow" if task.deliveries > 1 else "",
        ),
        Column("VO", "vo"),
        Column("worker", "worker", kind="worker"),
        _ARGUMENTS,
        Column("locks", "locks", kind="locks"),
    ),
)

QUEUED: View[models.QueuedTask] = View(
    "nothing waits",
    (
        Column("task", lambda task: task.task_name or "(no task)", whole=True, kind="task"),
        Column("task id", lambda task: task.task_id or task.entry, kind="id"),
        Column("waiting for", "waiting_since", since, right=True),
        Column("attempt", "attempt"),
        _ARGUMENTS,
    ),
)


def _lock_page(key: str) -> str:
    return f"/locks/one?key={_quoted(key)}"


DELAYED: View[models.DelayedTask] = View(
    "nothing is delayed",
    (
        Column("task", lambda task: task.task_name or "(no task)", whole=True, kind="task"),
        Column("task id", "task_id", kind="id"),
        Column("reason", "reason"),
        Column("due (UTC)", lambda task: None if task.lock else task.due, right=True, kind="age"),
        Column("queue", "queue"),
        _ARGUMENTS,
        Column(
            "lock, or last error",
            lambda task: task.lock or task.last_error,
            longest=_LONGEST_TEXT,
            link=lambda task: _lock_page(task.lock) if task.lock else None,
        ),
    ),
)


def _failure_style(share: float) -> str:
    return "red" if share >= 0.2 else "yellow" if share >= 0.02 else ""


STATISTICS: View[models.TaskStats] = View(
    "nothing has ended in this time",
    (
        Column("task", "task_name", whole=True, kind="task"),
        Column("done", "done", number, right=True),
        Column(
            "failed",
            "failed",
            number,
            right=True,
            link=lambda each: f"/failures?task={_quoted(each.task_name)}" if each.failed else None,
        ),
        Column(
            "rate",
            "failure_rate",
            percent,
            right=True,
            style=lambda each: _failure_style(each.failure_rate or 0.0),
        ),
        Column("retried", "retried", number, right=True),
        Column("dead", "dead", number, right=True, style=lambda each: "red" if each.dead else ""),
        *(
            Column[Any](f"{part} {percentile}", f"{part}.{percentile}_seconds", duration, right=True)
            for part in ("run", "queue")
            for percentile in ("p50", "p95", "p99")
        ),
    ),
)

WAITING_DEAD_LETTERS: View[models.WaitingDeadLetter] = View(
    "no dead letters wait in Redis",
    (
        Column("stored (UTC)", "buried", whole=True, kind="age"),
        Column("task", "task_name", kind="task"),
        Column("task id", "task_id", kind="id"),
        Column("reason", "reason", style=lambda dead_letter: "red" if dead_letter.reason == "poison" else ""),
        Column("attempts", "failed_attempts", right=True),
        _ARGUMENTS,
        Column("detail", "detail", longest=_LONGEST_ARGUMENTS),
    ),
)


DEAD_LETTERS: View[Mapping[str, Any]] = View(
    "no dead letters",
    (
        Column("number", "id", whole=True),
        Column("stored (UTC)", "buried_at", whole=True),
        Column("task", "task_name"),
        Column("task id", "task_id", kind="id"),
        Column("reason", "reason"),
        Column("status", lambda dead_letter: str(dead_letter["status"]).lower()),
        Column("attempts", "failed_attempts", right=True),
        Column("size", "message_bytes", size, right=True),
        Column("detail", "detail", longest=_LONGEST_TEXT),
    ),
)

AUDIT: View[AuditEntry] = View(
    "no action is recorded yet",
    (
        Column("at (UTC)", "at", whole=True, kind="clock"),
        Column("user", "who"),
        Column("via", "via"),
        Column("action", "action"),
        Column("target", "target", longest=_LONGEST_TEXT),
        Column(
            "outcome",
            lambda entry: ("failed: " if entry.ok is False else "") + (entry.outcome or "unknown"),
            longest=_LONGEST_TEXT,
            style=lambda entry: "red" if entry.ok is False else "",
        ),
    ),
)


def quota(lock: models.Lock) -> str:
    """Format the use of a lock or limiter: `3 of 10 in 60 s`."""
    limit = "" if lock.limit is None else f" of {lock.limit}"
    window = "" if lock.window_seconds is None else f" in {duration(lock.window_seconds)}"
    return f"{lock.held}{limit}{window}"


def holder(who: models.Holder) -> str:
    """Format the holder of a lock: its task if known."""
    if who.task_id is not None:
        return f"{who.task_name} {who.task_id}"
    return f"a task of {who.worker}" if who.worker is not None else "a holder outside the task system"


def _holders(lock: models.Lock) -> str:
    more = f" and {lock.held - 3} more" if len(lock.holders) > 3 else ""
    return ", ".join(map(holder, lock.holders[:3])) + more


LOCKS: View[models.Lock] = View(
    "no lock has holders or waiters",
    (
        Column("lock", "key", whole=True, link=lambda lock: _lock_page(lock.key)),
        Column("kind", "kind"),
        Column(
            "held",
            quota,
            right=True,
            meter=lambda lock: (lock.held if lock.limit else 0, lock.limit or 1),
        ),
        Column("waiting", "waiters", right=True, style=lambda lock: "yellow" if lock.waiters else ""),
        Column("expires, unless renewed", "expires", remaining, kind="age"),
        Column("held by", _holders, kind="holders"),
    ),
)

GROUPS: View[GroupStatus] = View(
    "no callback groups",
    (
        Column("group", "group_id", whole=True, link=lambda group: f"/groups/{_quoted(group.group_id)}"),
        Column("state", "state", style=lambda group: "red" if group.state == "failed" else ""),
        *(Column[Any](title, title, number, right=True) for title in ("total", "succeeded", "failed", "pending")),
        Column("callback", "callback"),
        Column("created", "created", lambda moment: moment.isoformat(timespec="seconds"), kind="age"),
    ),
)


def _schedule_state(state: ScheduleState) -> str:
    shown = str(state.state)
    if state.paused_since is not None and shown != "paused":
        shown += ", paused"
    if state.problem is not None:
        shown += f": {state.problem}"
    return shown if state.activity is None else f"{shown}, {state.activity}"


def _last_outcome(outcome: Outcome | None) -> str:
    if outcome is None:
        return NONE
    return f"{'ok' if outcome.ok else f'failed: {outcome.error}'}, {outcome.seconds:g} s, {plain(outcome.ended)}"


_SCHEDULE_STYLES = {"active": "green", "failing": "red", "paused": "yellow", "unplanned": "yellow"}

SCHEDULES: View[ScheduleState] = View(
    "no schedules",
    (
        Column("schedule", "id", whole=True),
        Column(
            "state",
            _schedule_state,
            longest=_LONGEST_TEXT,
            style=lambda state: _SCHEDULE_STYLES.get(str(state.state), "dim"),
        ),
        Column("next run (UTC)", "next_run", kind="age"),
        Column("last run (UTC)", "last_run", kind="age"),
        Column(
            "last outcome",
            "outcome",
            _last_outcome,
            style=lambda state: "red" if state.outcome and not state.outcome.ok else "",
        ),
        Column("rule", "rule", whole=True),
        Column("set by", "source"),
    ),
)


def _config_state(entry: ActiveConfig) -> str:
    if entry.problems:
        appeared = entry.problems_since
        return f"last valid one, for {since(None if appeared is None else moment_of(appeared))}"
    return "in force, with warnings" if entry.warnings else "in force"


ACTIVE_CONFIGS: View[ActiveConfig] = View(
    "no worker or scheduler runs",
    (
        Column("process", "process"),
        Column("role", "role", whole=True),
        Column("configuration", "digest", whole=True),
        Column(
            "since",
            "since",
            lambda at: f"{moment_of(at):%Y-%m-%d %H:%M:%SZ}",
            whole=True,
            kind="age",
        ),
        Column(
            "state",
            _config_state,
            style=lambda entry: "red" if entry.problems else "yellow" if entry.warnings else "green",
        ),
        Column("from", "source"),
        Column("VOs", lambda entry: NONE if entry.vos is None else ", ".join(entry.vos) or "none"),
    ),
)


def _setting(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value, default=str) if isinstance(value, dict | list) else plain(value)


#: Rows: task, setting, value, from (`code`, or the source).
SETTINGS: View[Mapping[str, Any]] = View(
    "no tasks are installed; load those of a file with --module",
    (
        Column("task", "task", str),
        Column("setting", "setting"),
        Column("value", "value", _setting, style=lambda row: "" if row["from"] == "code" else "bold"),
        Column("from", "from", style=lambda row: "dim" if row["from"] == "code" else ""),
    ),
)

#: Rows as of `operations.task_classes`.
TASK_CLASSES: View[Mapping[str, Any]] = View(
    "no tasks are installed; load those of a file with --module",
    (
        Column("name", "name", whole=True),
        *(Column[Any](title, title) for title in ("kind", "priority", "size")),
        Column("schedule", lambda row: (row["schedule"] or NONE) + ("" if row["enabled"] else " (off)")),
        Column("retry", "retry"),
        Column("dead letter", "dlq_eligible"),
        *(Column[Any](title, title) for title in ("arguments", "module")),
    ),
)
