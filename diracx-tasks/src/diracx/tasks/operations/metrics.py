"""Defines the metrics of workers and schedulers, with the names of the published package where it has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..plumbing.broker.streams import stream_name_for
from ..plumbing.broker.telemetry import Counts
from ..plumbing.enums import Priority
from ..plumbing.persistence.dead_letter import DeadLetterReason
from ..plumbing.worker.reporter import Reporter, TaskCounters
from .cursors import Registry, queue_of
from .exposition import counter, gauge, histogram
from .health import Health
from .models import Snapshot

if TYPE_CHECKING:
    from prometheus_client import Metric


def _of_stream(stream: str) -> dict[str, str]:
    priority, size = (*queue_of(stream).split(":"), "")[:2]  # messages may be in any stream
    return {"priority": priority, "size": size}


def worker_metrics(reporter: Reporter, counts: Counts, size: str, slots: int, registry: Registry) -> list[Metric]:
    """Return the metrics of one worker since its start.

    Series used by alert rules start at 0, as Prometheus sees no increase in a series that starts at 1.
    """
    known = reporter.totals()
    totals = [({"task_name": n, **_of_stream(stream)}, counters) for (n, stream), counters in known.items()]
    streams = [stream_name_for(priority, size) for priority in Priority]
    names = [name for name, task_class in registry.items() if task_class.size == size]
    awaited = {(name, stream): TaskCounters() for name in names for stream in streams} | known
    watched = [({"task_name": n, **_of_stream(stream)}, counters) for (n, stream), counters in awaited.items()]
    # Without the reasons of tasks that were executed.
    reasons = [each for each in DeadLetterReason if each not in ("exhausted", "unsettled")]
    rejected = {str(reason): 0 for reason in reasons} | reporter.rejected_totals()
    # A series continues at 0: Prometheus shows the last value of a missing one.
    in_progress = dict.fromkeys(known, 0) | reporter.in_progress()
    running = [({"task_name": n, **_of_stream(s)}, number) for (n, s), number in in_progress.items()]
    return [
        counter(
            "tasks_completed_total",
            "Executions that succeeded.",
            [(labels, each.done) for labels, each in totals],
        ),
        counter(
            "tasks_failed_total",
            "Executions that failed.",
            [(labels, each.failed) for labels, each in totals],
        ),
        counter(
            "tasks_retried_total",
            "Executions that will be repeated: after an error or interruption, or for lack of a lock.",
            [({**labels, "reason": "error"}, each.retried) for labels, each in totals]
            + [({**labels, "reason": "lock_contention"}, each.lock_waits) for labels, each in totals],
        ),
        counter(
            "tasks_given_up_total",
            "Tasks that failed permanently or were cancelled: dead letters, or discarded.",
            [({**labels, "action": "dlq"}, each.dead) for labels, each in watched]
            + [
                ({**labels, "action": "discarded"}, each.failed - each.retried - each.dead)
                for labels, each in watched
            ],
        ),
        counter(
            "task_locks_lost_total",
            "Executions that were cancelled because they lost a lock.",
            [(labels, each.locks_lost) for labels, each in totals],
        ),
        counter(
            "task_leases_lost_total",
            "Executions that another worker reclaimed because the lease had expired.",
            [(labels, each.taken_over) for labels, each in watched],
        ),
        counter(
            "task_messages_rejected_total",
            "Messages that could not be executed and became dead letters.",
            [({"reason": reason.replace(" ", "_")}, number) for reason, number in rejected.items()],
        ),
        counter(
            "task_messages_reclaimed_total",
            "Messages reclaimed from workers that crashed.",
            [({"stream": stream}, number) for stream, number in counts.reclaimed.items()],
        ),
        histogram(
            "task_duration_seconds",
            "Run time of executions.",
            [(labels, each.run_times, each.run) for labels, each in totals],
        ),
        histogram(
            "task_queue_wait_seconds",
            "Time from submission, due time, or first attempt to acquire a lock, to the start.",
            [(labels, each.queue_times, each.queue) for labels, each in totals],
        ),
        gauge("tasks_in_progress", "Running executions.", running),
        gauge("worker_max_concurrent_tasks", "Slots of the worker.", [({"worker_size": size}, slots)]),
        *_submitted(counts),
    ]


def _submitted(counts: Counts) -> list[Metric]:
    """Return the metrics of submitted and delayed tasks."""
    return [
        counter(
            "tasks_submitted_total",
            "Tasks that this process submitted.",
            [
                ({"task_name": name, **_of_stream(stream), "delayed": str(delayed).lower()}, number)
                for (name, stream, delayed), number in counts.submitted.items()
            ],
        ),
        counter(
            "delayed_tasks_promoted_total",
            "Delayed tasks that this process promoted.",
            [({}, counts.promoted)] if counts.promoted else [],
        ),
        counter(
            "delayed_tasks_unparsable_total",
            "Delayed tasks that this process could not decode and stored as dead letters.",
            [({}, counts.unparsable)],
        ),
    ]


def scheduler_metrics(health: Health | None, counts: Counts) -> list[Metric]:
    """Return the metrics of a scheduler; those of the leader, which has `health`, include the whole system."""
    metrics: list[Metric] = [
        gauge("scheduler_leader", "1 if this scheduler leads.", [({}, 0 if health is None else 1)]),
        counter(
            "scheduler_periodic_submissions_total",
            "Occurrences that this scheduler submitted, or failed to submit.",
            [
                ({"task_name": name, "outcome": "success" if submitted else "failure"}, number)
                for (name, submitted), number in counts.occurrences.items()
            ],
        ),
        *_submitted(counts),
    ]
    if health is not None:
        metrics += health_metrics(health)
        if health.snapshot is not None:
            metrics += _whole_system(health.snapshot)
    return metrics


def health_metrics(health: Health) -> list[Metric]:
    """Return the results of the health checks, for alert rules."""
    alerts = [
        ({"check": alert.check, "severity": str(alert.severity), "subject": alert.subject}, alert)
        for alert in health.alerts
    ]
    return [
        gauge(
            "health_status",
            "Severity of the worst alert: 0 ok, 1 warning, 2 critical, 3 unknown.",
            [({}, health.severity.exit_code)],
        ),
        gauge(
            "health_alerts",
            "Number of tasks, workers, ... affected by each alert.",
            [(labels, alert.count) for labels, alert in alerts],
        ),
        gauge(
            "health_alert_since_seconds",
            "Start of each alert, in seconds since the epoch.",
            [(labels, alert.since.timestamp()) for labels, alert in alerts if alert.since is not None],
        ),
    ]


def _whole_system(seen: Snapshot) -> list[Metric]:
    streams = [
        {"stream": stream_name_for(q.priority, q.size), "priority": q.priority, "size": q.size}
        for q in seen.queues
    ]
    oldest = [q.oldest_waiting_seconds or 0 for q in seen.queues]
    workers: dict[str, int] = {"small": 0, "medium": 0, "large": 0}
    for worker in seen.workers:
        if worker.alive and worker.size is not None:
            workers[worker.size] = workers.get(worker.size, 0) + 1
    return [
        *(
            gauge(name, about, zip(streams, values, strict=True))
            for name, about, values in (
                ("task_stream_length", "Tasks queued and running.", [q.backlog + q.running for q in seen.queues]),
                ("task_stream_lag", "Tasks that wait for a worker.", [q.backlog for q in seen.queues]),
                ("task_stream_pending", "Tasks delivered to workers.", [q.running for q in seen.queues]),
                ("task_stream_oldest_seconds", "Age of the oldest waiting task.", oldest),
            )
        ),
        *(
            gauge(name, about, [({}, value)])
            for name, about, value in (
                ("delayed_tasks_pending", "Delayed tasks.", sum(seen.delayed.values())),
                ("delayed_tasks_overdue", "Delayed tasks that are more than 10 s late.", seen.overdue),
                ("delayed_tasks_lateness_seconds", "Maximum delay.", seen.delayed_lateness_seconds),
                ("schedules", "Schedules with a next run.", seen.schedules),
                ("schedules_late", "Schedules that are more than 10 s late.", seen.schedules_late),
                ("schedule_lateness_seconds", "Maximum delay of a schedule.", seen.schedule_lateness_seconds),
                ("callback_groups_pending", "Pending callback groups.", seen.groups),
                ("dead_letters_waiting", "Dead letters that wait in Redis.", seen.dead_letters_waiting),
                ("tasks_redis_memory_bytes", "Memory used by the server.", seen.memory_bytes or 0),
                ("tasks_redis_memory_limit_bytes", "Its limit; 0: no limit.", seen.memory_limit_bytes or 0),
            )
        ),
        gauge(
            "delayed_tasks",
            "Delayed tasks, by reason.",
            [({"reason": reason}, number) for reason, number in seen.delayed.items()],
        ),
        gauge("workers_alive", "Workers by size.", [({"size": s}, n) for s, n in workers.items()]),
    ]
