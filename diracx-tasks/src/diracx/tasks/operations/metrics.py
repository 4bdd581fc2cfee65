"""Defines the metrics of workers and schedulers. Names are those of the published package where it has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..plumbing.broker.counts import Counts
from ..plumbing.broker.streams import stream_name_for
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
    priority, size = (*queue_of(stream).split(":"), "")[:2]  # a message can be sent to any stream
    return {"priority": priority, "size": size}


def worker_metrics(reporter: Reporter, counts: Counts, size: str, slots: int, registry: Registry) -> list[Metric]:
    """Return the metrics of one worker since its start.

    Those that alerts watch are there from the start, at 0: an increase is not seen in a series that begins at 1.
    """
    known = reporter.totals()
    totals = [({"task_name": n, **_of_stream(stream)}, sums) for (n, stream), sums in known.items()]
    streams = [stream_name_for(priority, size) for priority in Priority]
    names = [name for name, task_class in registry.items() if task_class.size == size]
    awaited = {(name, stream): TaskCounters() for name in names for stream in streams} | known
    watched = [({"task_name": n, **_of_stream(stream)}, sums) for (n, stream), sums in awaited.items()]
    # The others are those of tasks that were executed.
    reasons = [each for each in DeadLetterReason if each not in ("exhausted", "unsettled")]
    rejected = {str(reason): 0 for reason in reasons} | reporter.rejected_totals()
    # A series that has ended goes on at 0: collectors show the last value of one that is missing.
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
            "Executions put off: failed or interrupted, and to start again; or without a lock.",
            [({**labels, "reason": "error"}, each.retried) for labels, each in totals]
            + [({**labels, "reason": "lock_contention"}, each.lock_waits) for labels, each in totals],
        ),
        counter(
            "tasks_given_up_total",
            "Tasks that failed permanently or were cancelled: with the dead letters, or gone.",
            [({**labels, "action": "dlq"}, each.dead) for labels, each in watched]
            + [
                ({**labels, "action": "discarded"}, each.failed - each.retried - each.dead)
                for labels, each in watched
            ],
        ),
        counter(
            "task_locks_lost_total",
            "Executions that were cancelled because a lock was gone.",
            [(labels, each.locks_lost) for labels, each in totals],
        ),
        counter(
            "task_leases_lost_total",
            "Executions that another worker took over because the lease had ended.",
            [(labels, each.taken_over) for labels, each in watched],
        ),
        counter(
            "task_messages_rejected_total",
            "Messages that could not be executed, and are with the dead letters.",
            [({"reason": reason.replace(" ", "_")}, number) for reason, number in rejected.items()],
        ),
        counter(
            "task_messages_reclaimed_total",
            "Messages taken over from workers that had died.",
            [({"stream": stream}, number) for stream, number in counts.reclaimed.items()],
        ),
        histogram(
            "task_duration_seconds",
            "Time that executions took.",
            [(labels, each.run_times, each.run) for labels, each in totals],
        ),
        histogram(
            "task_queue_wait_seconds",
            "Time from the queue, or from the first look for a lock, to the beginning.",
            [(labels, each.queue_times, each.queue) for labels, each in totals],
        ),
        gauge("tasks_in_progress", "Executions that go on.", running),
        gauge("worker_max_concurrent_tasks", "Slots of the worker.", [({"worker_size": size}, slots)]),
        *_submitted(counts),
    ]


def _submitted(counts: Counts) -> list[Metric]:
    """Return the metrics of submitted and of delayed tasks, by workers and schedulers."""
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
            "Delayed tasks that this process moved into their queues.",
            [({}, counts.promoted)] if counts.promoted else [],
        ),
        counter(
            "delayed_tasks_unparsable_total",
            "Delayed tasks that this process could not read, and has put with the dead letters.",
            [({}, counts.unparsable)],
        ),
    ]


def scheduler_metrics(health: Health | None, counts: Counts) -> list[Metric]:
    """Return the metrics of a scheduler; of the leading one also those of the whole system.

    Args:
        health: of the whole system; None for one that stands by.
    """
    metrics: list[Metric] = [
        gauge("scheduler_leader", "1 if this scheduler leads.", [({}, 0 if health is None else 1)]),
        counter(
            "scheduler_periodic_submissions_total",
            "Runs of schedules that this scheduler submitted, or could not.",
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
            "The worst severity: 0 ok, 1 warning, 2 critical, 3 unknown.",
            [({}, health.severity.exit_code)],
        ),
        gauge(
            "health_alerts",
            "How many tasks, workers, ... each alert of the health checks is about.",
            [(labels, alert.count) for labels, alert in alerts],
        ),
        gauge(
            "health_alert_since_seconds",
            "Since when each alert is so, as seconds since the epoch.",
            [(labels, alert.since.timestamp()) for labels, alert in alerts if alert.since is not None],
        ),
    ]


def _whole_system(seen: Snapshot) -> list[Metric]:
    queues = [
        ({"stream": stream_name_for(q.priority, q.size), "priority": q.priority, "size": q.size}, q)
        for q in seen.queues
    ]
    workers: dict[str, int] = {"small": 0, "medium": 0, "large": 0}
    for worker in seen.workers:
        if worker.alive and worker.size is not None:
            workers[worker.size] = workers.get(worker.size, 0) + 1
    return [
        gauge(
            "task_stream_length",
            "Tasks queued and running.",
            [(labels, q.backlog + q.running) for labels, q in queues],
        ),
        gauge(
            "task_stream_lag",
            "Tasks that wait for a worker.",
            [(labels, q.backlog) for labels, q in queues],
        ),
        gauge(
            "task_stream_pending",
            "Tasks in the hands of workers.",
            [(labels, q.running) for labels, q in queues],
        ),
        gauge(
            "task_stream_oldest_seconds",
            "How long the first of those that wait has been waiting.",
            [(labels, q.oldest_waiting_seconds or 0) for labels, q in queues],
        ),
        *(
            gauge(name, about, [({}, value)])
            for name, about, value in (
                ("delayed_tasks_pending", "Delayed tasks, whatever for.", sum(seen.delayed.values())),
                ("delayed_tasks_overdue", "Delayed tasks that are more than 10 s late.", seen.overdue),
                ("delayed_tasks_lateness_seconds", "How late the latest is.", seen.delayed_lateness_seconds),
                ("schedules", "Schedules with a next run.", seen.schedules),
                ("schedules_late", "Schedules that are more than 10 s late.", seen.schedules_late),
                ("schedule_lateness_seconds", "How late the latest schedule is.", seen.schedule_lateness_seconds),
                ("callback_groups_pending", "Groups that have not called back.", seen.groups),
                ("dead_letters_waiting", "Dead letters that wait in Redis.", seen.dead_letters_waiting),
                ("tasks_redis_memory_bytes", "Memory that the server uses.", seen.memory_bytes or 0),
                ("tasks_redis_memory_limit_bytes", "What it may use; 0: no limit.", seen.memory_limit_bytes or 0),
            )
        ),
        gauge(
            "delayed_tasks",
            "Delayed tasks, by reason.",
            [({"reason": reason}, number) for reason, number in seen.delayed.items()],
        ),
        gauge("workers_alive", "Workers by size.", [({"size": s}, n) for s, n in workers.items()]),
    ]
