"""Metrics as Prometheus reads them. Names are those of the published package where it has the figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

from ..plumbing.histogram import end_of_bucket
from .places import queue_of

if TYPE_CHECKING:
    from ..plumbing.worker.reporter import Reporter
    from .models import Snapshot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_Labels = Mapping[str, str]
#: Every fourth of our buckets, from 8 ms to 70 min: each is twice as long as the one before.
_LAST_OF_BUCKETS = range(12, 92, 4)


class _Page:
    """Metrics in the text format, each name once."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(
        self,
        name: str,
        kind: Literal["counter", "gauge"],
        about: str,
        samples: Iterable[tuple[_Labels, float]],
    ) -> None:
        """A counter or a gauge, with a sample for each set of labels."""
        self._head(name, kind, about)
        self._lines += [f"{name}{_labels(labels)} {_number(value)}" for labels, value in samples]

    def add_histogram(self, name: str, about: str, samples: Iterable[tuple[_Labels, list[int], float]]) -> None:
        """A histogram, from the counts in our buckets and the sum (s) of each set of labels."""
        self._head(name, "histogram", about)
        for labels, counts, total in samples:
            for last in _LAST_OF_BUCKETS:
                bucket = {**labels, "le": f"{end_of_bucket(last):g}"}
                self._lines.append(f"{name}_bucket{_labels(bucket)} {sum(counts[: last + 1])}")
            self._lines.append(f"{name}_bucket{_labels({**labels, 'le': '+Inf'})} {sum(counts)}")
            self._lines.append(f"{name}_sum{_labels(labels)} {_number(total)}")
            self._lines.append(f"{name}_count{_labels(labels)} {sum(counts)}")

    def _head(self, name: str, kind: str, about: str) -> None:
        self._lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]

    def text(self) -> str:
        """The whole of it."""
        return "\n".join(self._lines) + "\n"


def _labels(labels: _Labels) -> str:
    if not labels:
        return ""
    inside = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return f"{{{inside}}}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else repr(float(value))


def _of_stream(stream: str) -> dict[str, str]:
    priority, size = queue_of(stream).split(":")
    return {"priority": priority, "size": size}


def worker_metrics(reporter: Reporter, size: str, slots: int) -> str:
    """What one worker has counted since it began."""
    page = _Page()
    totals = [({"task_name": n, **_of_stream(stream)}, sums) for (n, stream), sums in reporter.totals().items()]
    page.add(
        "tasks_completed_total",
        "counter",
        "Executions that succeeded.",
        [(labels, each.done) for labels, each in totals],
    )
    page.add(
        "tasks_failed_total",
        "counter",
        "Executions that failed.",
        [(labels, each.failed) for labels, each in totals],
    )
    page.add(
        "tasks_retried_total",
        "counter",
        "Executions put off: failed and to be retried, or without a lock.",
        [({**labels, "reason": "error"}, each.retried) for labels, each in totals]
        + [({**labels, "reason": "lock_contention"}, each.lock_waits) for labels, each in totals],
    )
    page.add(
        "tasks_given_up_total",
        "counter",
        "Tasks that failed for good or were cancelled: with the dead letters, or gone.",
        [({**labels, "action": "dlq"}, each.dead) for labels, each in totals]
        + [({**labels, "action": "discarded"}, each.failed - each.retried - each.dead) for labels, each in totals],
    )
    page.add(
        "task_locks_lost_total",
        "counter",
        "Executions that were cancelled because a lock was gone.",
        [(labels, each.locks_lost) for labels, each in totals],
    )
    page.add(
        "task_leases_lost_total",
        "counter",
        "Executions that another worker took over because the lease had ended.",
        [(labels, each.taken_over) for labels, each in totals],
    )
    page.add(
        "task_messages_rejected_total",
        "counter",
        "Messages that could not be executed, and are with the dead letters.",
        [({"reason": reason}, number) for reason, number in reporter.rejected_totals().items()],
    )
    page.add_histogram(
        "task_duration_seconds",
        "Time that executions took.",
        [(labels, each.run_times, each.run) for labels, each in totals],
    )
    page.add_histogram(
        "task_queue_wait_seconds",
        "Time from the queue, or from the first look for a lock, to the beginning.",
        [(labels, each.queue_times, each.queue) for labels, each in totals],
    )
    page.add(
        "tasks_in_progress",
        "gauge",
        "Executions that go on.",
        [({"task_name": n, **_of_stream(s)}, number) for (n, s), number in reporter.in_progress().items()],
    )
    page.add("worker_max_concurrent_tasks", "gauge", "Slots of the worker.", [({"worker_size": size}, slots)])
    return page.text()


def system_metrics(seen: Snapshot | None) -> str:
    """What the leading scheduler tells of the whole system; of one that stands by (None), only that."""
    page = _Page()
    page.add("scheduler_leader", "gauge", "1 if this scheduler leads.", [({}, 0 if seen is None else 1)])
    if seen is None:
        return page.text()
    queues = [
        ({"stream": f"diracx:tasks:{queue.name}", "priority": queue.priority, "size": queue.size}, queue)
        for queue in seen.queues
    ]
    page.add(
        "task_stream_length",
        "gauge",
        "Tasks queued and running.",
        [(labels, q.backlog + q.running) for labels, q in queues],
    )
    page.add(
        "task_stream_lag", "gauge", "Tasks that wait for a worker.", [(labels, q.backlog) for labels, q in queues]
    )
    page.add(
        "task_stream_pending",
        "gauge",
        "Tasks in the hands of workers.",
        [(labels, q.running) for labels, q in queues],
    )
    page.add(
        "task_stream_oldest_seconds",
        "gauge",
        "How long the first of those that wait has been waiting.",
        [(labels, q.oldest_waiting_seconds or 0) for labels, q in queues],
    )
    workers: dict[str, int] = {"small": 0, "medium": 0, "large": 0}
    for worker in seen.workers:
        if worker.alive and worker.size is not None:
            workers[worker.size] = workers.get(worker.size, 0) + 1
    for name, about, value in (
        ("delayed_tasks_pending", "Tasks put aside, whatever for.", sum(seen.delayed.values())),
        ("delayed_tasks_overdue", "Tasks put aside that are more than 10 s late.", seen.overdue),
        ("delayed_tasks_lateness_seconds", "How late the latest of them is.", seen.delayed_lateness_seconds),
        ("schedules", "Schedules with a next run.", seen.schedules),
        ("schedules_late", "Schedules that are more than 10 s late.", seen.schedules_late),
        ("schedule_lateness_seconds", "How late the latest schedule is.", seen.schedule_lateness_seconds),
        ("callback_groups_pending", "Groups that have not called back.", seen.groups),
        ("dead_letters_waiting", "Dead letters that wait in Redis for a database.", seen.dead_letters_waiting),
        ("tasks_redis_memory_bytes", "Memory that the server uses.", seen.memory_bytes or 0),
        ("tasks_redis_memory_limit_bytes", "What it may use; 0: no limit.", seen.memory_limit_bytes or 0),
    ):
        page.add(name, "gauge", about, [({}, value)])
    page.add(
        "delayed_tasks",
        "gauge",
        "Tasks put aside, by reason.",
        [({"reason": reason}, number) for reason, number in seen.delayed.items()],
    )
    page.add("workers_alive", "gauge", "Workers by size.", [({"size": s}, n) for s, n in workers.items()])
    return page.text()
