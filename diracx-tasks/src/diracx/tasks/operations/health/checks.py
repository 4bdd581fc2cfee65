"""The health checks: each yields an alert for every problem that it finds in the facts.

The first line of a check's docstring is shown to users who may not see its alerts.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from functools import partial, wraps
from typing import TypeAlias
from urllib.parse import quote

from ...plumbing.broker.server_check import SAFE_POLICY, eviction_problem, obstacle, risks
from ...plumbing.broker.stored import moment_of
from ..formats import duration
from .alerts import Alert, Severity, counted
from .facts import Facts

Check: TypeAlias = Callable[[Facts], Iterator[Alert]]
#: Makes an alert of a check, given the fields that differ from those of the check.
NewAlert: TypeAlias = Callable[..., Alert]

#: A queue grows if its input rate exceeds its output rate by this factor.
_GROWING = 1.1
#: Maximum length of names that come from messages.
_LONGEST_NAME = 100
#: Maximum number of alerts of one check.
LISTED = 20
_REJECTED_REMEDIES = {
    "unknown task": "workers lack this task: install its package there, or start them with its --module",
    "arguments": "they were submitted with another version of the task: install the same version everywhere",
    "unparsable": "another program writes to the streams of the task system, or data are corrupt",
    "poison": "every worker that executed it crashed: see their log before it is submitted again",
}

CHECKS: dict[str, Check] = {}
"""By name, in the order in which their alerts are listed."""


def _check(
    *, public: bool, severity: Severity = Severity.WARNING, path: str = "/"
) -> Callable[[Callable[[Facts, NewAlert], Iterator[Alert]]], Check]:
    """Register a check with the fields that its alerts have by default.

    Args:
        public: members of VOs see its alerts in full.
    """

    def register(check: Callable[[Facts, NewAlert], Iterator[Alert]]) -> Check:
        alert = partial(Alert, check=check.__name__, public=public, severity=severity, path=path)

        @wraps(check)
        def run(facts: Facts) -> Iterator[Alert]:
            return check(facts, alert)

        CHECKS[check.__name__] = run
        return run

    return register


@_check(public=True)
def server_unusable(facts: Facts, alert: NewAlert) -> Iterator[Alert]:
    """The task system cannot work on this server."""
    if (problem := obstacle(facts.server)) is not None:
        yield unusable(problem)


def unusable(
    problem: str, remedy: str = "correct the URL of the broker or the server: docs/how-to/choose-a-server.md"
) -> Alert:
    """Make the alert for a server that is unsupported or refuses writes."""
    return Alert(
        check="server_unusable",
        public=True,
        severity=Severity.CRITICAL,
        summary=f"Redis {problem}",
        remedy=remedy,
    )


@_check(public=True)
def eviction(facts: Facts, alert: NewAlert) -> Iterator[Alert]:
    """Redis may evict tasks, or has evicted some."""
    limit = facts.seen.memory_limit_bytes
    problem = eviction_problem(facts.seen.memory_policy, limit)
    evicted_keys = int(facts.server.info.get("evicted_keys", 0))
    if problem is None and evicted_keys:
        problem = f"Redis has evicted {counted(evicted_keys, 'key', 'keys')} since its start"
    if problem is not None:
        may_happen = limit is not None and facts.seen.memory_policy != SAFE_POLICY
        yield alert(
            severity=Severity.CRITICAL if may_happen else Severity.WARNING,
            summary=problem,
            remedy=f"set `maxmemory-policy {SAFE_POLICY}` in its configuration; caches belong on another server",
            count=max(1, evicted_keys),
        )


@_check(public=True)
def persistence(facts: Facts, alert: NewAlert) -> Iterator[Alert]:
    """Redis loses tasks when it is restarted or its machine crashes."""
    return _risks(facts, alert, "persistence")


@_check(public=True)
def replication(facts: Facts, alert: NewAlert) -> Iterator[Alert]:
    """A failover of Redis may lose more than the last seconds."""
    return _risks(facts, alert, "replication")


def _risks(facts: Facts, alert: NewAlert, check: str) -> Iterator[Alert]:
    return (alert(summary=risk.problem, remedy=risk.remedy) for risk in risks(facts.server) if risk.check == check)


@_check(public=True)
def memory(facts: Facts, alert: NewAlert) -> Iterator[Alert]:
    """Redis is close to the memory limit at which it refuses new tasks."""
    used, limit = facts.seen.memory_bytes, facts.seen.memory_limit_bytes
    if used is None or not limit or used < facts.limits.memory_warning_share * limit:
        return
    yield alert(
        severity=Severity.CRITICAL if used >= facts.limits.memory_critical_share * limit else Severity.WARNING,
        summary=f"Redis uses {used / limit:.0%} of its memory: at 100 % it refuses new tasks",
        remedy="find the queue that grows (`diracx-task-run queue list`); add workers, or memory",
    )


@_check(public=True, severity=Severity.CRITICAL, path="/schedules")
def no_scheduler(facts: Facts, alert: NewAlert) -> Iterator[Alert]:
    """No scheduler leads: no periodic task is submitted."""
    seen = facts.seen
    if seen.schedules and not seen.scheduler_leads:
        late = seen.schedule_lateness_seconds
        yield alert(
            summary=f"no scheduler leads: {counted(seen.schedules, 'schedule is', 'schedules are')} not submitted",
            remedy="start one: `diracx-task-run scheduler`",
            count=seen.schedules,
            since=seen.at - timedelta(seconds=late) if late else None,
        )


@_check(public=True, severity=Severity.CRITICAL, path="/schedules")
def schedules_late(facts: Facts, alert: NewAlert) -> Iterator[Alert]:
    """The leading scheduler does not keep up."""
    seen = facts.seen
    if seen.scheduler_leads and seen.schedule_lateness_seconds > facts.limits.late_seconds:
        yield alert(
            summary=f"{counted(seen.schedules_late, 'schedule is', 'schedules are')} late, "
            f"the worst by {duration(seen.schedule_lateness_seconds)}",
            remedy="see `diracx-task-run schedule list` and the log of the scheduler",
            count=max(1, seen.schedules_late),
            since=seen.at - timedelta(seconds=seen.schedule_lateness_seconds),
        )


@_check(public=False, severity=Severity.CRITICAL, path="/schedules")
def schedules_failing(facts: Facts, alert: NewAlert) -> Iterator[Alert]:
    """The leading scheduler cannot submit some schedules: these are off until that is fixed."""
    if facts.schedule_problems:
        first, why = min(facts.schedule_problems.items())
        number = len(facts.schedule_problems)
        yield alert(
            summary=f"{counted(number, 'schedule', 'schedules')} cannot be submitted: {first}: {why}",
            remedy="`diracx-task-run schedule list` lists them with the reason",
            count=number,
        )


@_check(public=True, severity=Severity.CRITICAL, path="/delayed")
def delayed_overdue(facts: Facts, alert: NewAlert) -> Iterator[Alert]:
    """Due retries and other delayed tasks are not promoted."""
    seen = facts.seen
    if seen.overdue and seen.delayed_lateness_seconds > facts.limits.late_seconds:
        tasks = counted(seen.overdue, "delayed task is", "delayed tasks are")
        yield alert(
            summary=f"{tasks} overdue: no worker or scheduler promotes them",
            remedy="start a worker or a scheduler",
            count=seen.overdue,
            since=seen.at - timedelta(seconds=seen.delayed_lateness_seconds),
        )


@_check(public=True, severity=Severity.CRITICAL)
def queue_without_worker(facts: Facts, alert: NewAlert) -> Iterator[Alert]:
    """Tasks are queued, and no worker of their size runs."""
    served = _served(facts)
    for queue in facts.seen.queues:
        if queue.backlog and queue.size not in served and None not in served:
            tasks = counted(queue.backlog, "task waits", "tasks wait")
            yield alert(
                summary=f"{queue.name}: {tasks}, and no worker of size {queue.size} runs",
                remedy=f"start one: `diracx-task-run worker --worker-size {queue.size}`",
                count=queue.backlog,
                subject=queue.name,
                since=_waiting_since(facts, queue.oldest_waiting_seconds),
                path=f"/queues/{queue.name}",
            )


@_check(public=False, severity=Severity.CRITICAL, path="/workers")
def worker_blocked(facts: Facts, alert: NewAlert) -> Iterator[Alert]:
    """A task blocks the event loop of its worker, and so its other tasks."""
    for worker in facts.seen.workers:
        if worker.alive and (blocked := worker.blocked) is not None:
            which = f"{blocked.task_name} {blocked.task_id}" if blocked.task_id else "a task"
            yield alert(
                summary=f"worker {worker.name}: {which} blocks its event loop",
                remedy="see the stack in `workers --json` or in the log and fix the task; restart the worker with "
                "`--hard-limit`",
                subject=worker.name,
                since=blocked.since,
            )


@_check(public=True, severity=Severity.CRITICAL, path="/workers")
def worker_silent(facts: Facts, alert: NewAlert) -> Iterator[Alert]:
    """A worker renews its lease, but sends no reports."""
    for worker in facts.seen.workers:
        if not worker.alive or worker.blocked is not None or worker.seen is None:
            continue
        silent = (facts.seen.at - worker.seen).total_seconds()
        if silent > facts.limits.silent_seconds:
            yield alert(
                summary=f"worker {worker.name} is alive, but has not reported for {duration(silent)}",
                remedy="see its log: a task blocks it, or its Redis user may not write",
                subject=worker.name,
                since=worker.seen,
            )


@_check(public=True)
def tasks_failing(facts: Facts, alert: NewAlert) -> Iterator[Alert]:
    """Most attempts of a task class fail."""
    for each in facts.stats:
        attempts, rate = each.done + each.failed, each.failure_rate or 0.0
        if attempts < facts.limits.failure_attempts or rate < facts.limits.failure_warning_share:
            continue
        yield alert(
            severity=Severity.CRITICAL if rate >= facts.limits.failure_critical_share else Severity.WARNING,
            summary=f"{each.task_name} fails in {rate:.0%} of its attempts: "
            f"{each.failed:,} of {attempts:,} within the past hour",
            remedy=f"`diracx-task-run tasks stats --task {shlex.quote(each.task_name)} --failures 3` shows the "
            "errors",
            count=each.failed,
            subject=each.task_name,
            path=f"/failures?task={quote(each.task_name, safe='')}",
        )


@_check(public=False, path="/configuration")
def configuration(facts: Facts, alert: NewAlert) -> Iterator[Alert]:
    """Processes use an earlier configuration, or different ones."""
    wrong = [each for each in facts.configurations if each.problems]
    digests = {each.digest for each in facts.configurations}
    if wrong:
        since = [each.problems_since for each in wrong if each.problems_since is not None]
        yield alert(
            severity=Severity.CRITICAL,
            summary=f"{counted(len(wrong), 'process uses', 'processes use')} an earlier configuration, as the "
            f"current one is wrong: {wrong[0].problems[0][:200]}",
            remedy="`diracx-task-run config check` lists every mistake with its line",
            count=len(wrong),
            since=moment_of(min(since)) if since else None,
        )
    elif len(digests) > 1:
        newest = max(each.since for each in facts.configurations)
        if facts.seen.at.timestamp() - newest > facts.limits.configuration_seconds:
            yield alert(
                summary=f"{len(digests)} different configurations are in force",
                remedy="`diracx-task-run config in-force` lists the configuration of each process",
                count=len(digests),
                since=moment_of(newest),
            )


@_check(public=True)
def backlog(facts: Facts, alert: NewAlert) -> Iterator[Alert]:
    """The workers of a queue do not keep up."""
    served = _served(facts)
    for queue in facts.seen.queues:
        if not queue.backlog or (queue.size not in served and None not in served):
            continue
        waits = queue.oldest_waiting_seconds or 0.0
        rate_in, rate_out = queue.in_per_second or 0.0, queue.out_per_second or 0.0
        growing = queue.backlog >= facts.limits.growing_backlog and rate_in > _GROWING * rate_out
        if not growing and (waits <= facts.limits.wait_seconds or queue.priority == "background"):
            continue
        tasks = counted(queue.backlog, "task waits", "tasks wait")
        growth = f"; the backlog grows by {rate_in - rate_out:.1f} tasks per second" if growing else ""
        yield alert(
            summary=f"{queue.name}: {tasks}, the first for {duration(waits)}{growth}",
            remedy="see `diracx-task-run running`: all slots are in use, or a poison candidate runs alone; add "
            "workers, or `--processes`",
            count=queue.backlog,
            subject=queue.name,
            since=_waiting_since(facts, queue.oldest_waiting_seconds),
            path=f"/queues/{queue.name}",
        )


@_check(public=False, path="/running")
def tasks_overdue(facts: Facts, alert: NewAlert) -> Iterator[Alert]:
    """Tasks continue after their time limit or their cancellation."""
    for worker, task in facts.running:
        since = task.overdue_since
        if since is None or facts.seen.at.timestamp() - since < facts.limits.overdue_task_seconds:
            continue
        yield alert(
            summary=f"{task.task_name} {task.task_id} continues after its time limit or its cancellation",
            remedy=f"it occupies a slot of {worker} until it ends: fix the task, or use `--hard-limit`",
            subject=task.task_id,
            since=moment_of(since),
        )


@_check(public=False, path="/running")
def poison_candidates(facts: Facts, alert: NewAlert) -> Iterator[Alert]:
    """A running task was on workers that crashed."""
    for _, task in facts.running:
        if task.deliveries >= facts.limits.deliveries:
            yield alert(
                summary=f"{task.task_name} {task.task_id} was delivered {task.deliveries} times: the "
                "workers that executed it crashed",
                remedy="its worker fetches no other task until it ends; see the log of those workers, and "
                "cancel the task if it made them crash",
                count=task.deliveries,
                subject=task.task_id,
                since=moment_of(task.since),
            )


@_check(public=False, path="/failures")
def messages_rejected(facts: Facts, alert: NewAlert) -> Iterator[Alert]:
    """Within the past hour, messages arrived that no worker could execute."""
    for reason in dict.fromkeys(each.type for each in facts.rejected):
        these = [each for each in facts.rejected if each.type == reason]
        names = list(dict.fromkeys(each.task_name[:_LONGEST_NAME] or "no task" for each in these))
        which = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        yield alert(
            severity=Severity.CRITICAL if reason == "poison" else Severity.WARNING,
            summary=f"{counted(len(these), 'message', 'messages')} could not be executed ({reason}): {which}",
            remedy=_REJECTED_REMEDIES.get(reason, "see `diracx-task-run dlq list`"),
            count=len(these),
            subject=reason,
            since=these[-1].at,
        )


@_check(public=False, path="/locks")
def locks_held(facts: Facts, alert: NewAlert) -> Iterator[Alert]:
    """A task has held a lock for a long time while others wait for it."""
    for lock in facts.contended:
        held = (facts.seen.at - lock.since).total_seconds()
        if held > facts.limits.lock_held_seconds:
            yield alert(
                summary=f"{lock.key}: {lock.task_name} {lock.task_id} has held it for {duration(held)}, and "
                f"{counted(lock.waiters, 'task waits', 'tasks wait')} for it",
                remedy=f"`diracx-task-run cancel {shlex.quote(lock.task_id)}` if it is not needed; give its "
                "class a time limit",
                count=lock.waiters,
                subject=lock.key,
                since=lock.since,
            )


@_check(public=True, path="/groups")
def groups_stuck(facts: Facts, alert: NewAlert) -> Iterator[Alert]:
    """Callback groups have not progressed for a day."""
    if facts.seen.groups_stuck:
        yield alert(
            summary=f"{counted(facts.seen.groups_stuck, 'callback group', 'callback groups')} failed without "
            "an on_failure callback, or had no child that ended for a day",
            remedy="see `diracx-task-run group list`; submit failed children again, or fire the callback",
            count=facts.seen.groups_stuck,
        )


@_check(public=True, path="/dead-letters")
def dead_letters_waiting(facts: Facts, alert: NewAlert) -> Iterator[Alert]:
    """Dead letters wait in Redis."""
    seen = facts.seen
    if seen.dead_letters_waiting:
        dead_letters = counted(seen.dead_letters_waiting, "dead letter waits", "dead letters wait")
        yield alert(
            summary=f"{dead_letters} in Redis: no worker has stored them in the database",
            remedy="see `diracx-task-run dlq waiting`; workers with DIRACX_DB_URL_TASKDB import them: check that "
            "one runs, that the database responds, and whether the log has errors of it",
            count=seen.dead_letters_waiting,
            since=seen.dead_letters_waiting_since,
        )


@_check(public=True, path="/workers")
def workers_dead(facts: Facts, alert: NewAlert) -> Iterator[Alert]:
    """Workers have crashed; others reclaim their tasks."""
    if dead := [worker for worker in facts.seen.workers if not worker.alive]:
        names = ", ".join(worker.name for worker in dead[:3]) + (", …" if len(dead) > 3 else "")
        yield alert(
            summary=f"{counted(len(dead), 'worker is', 'workers are')} dead: {names}",
            remedy="other workers reclaim their tasks; see their log, and that of the kernel (out of memory?)",
            count=len(dead),
            since=min(filter(None, (worker.seen or worker.lease_until for worker in dead)), default=None),
        )


def describe(check: str) -> str:
    """Describe a check in one line: the first of its docstring."""
    found = CHECKS.get(check)
    return check.replace("_", " ") if found is None else (found.__doc__ or "").splitlines()[0].rstrip(".")


def find_alerts(facts: Facts) -> list[Alert]:
    """Run all health checks. Returns at most 20 alerts of each, and one that counts the rest."""
    alerts: list[Alert] = []
    for name, check in CHECKS.items():
        found = list(check(facts))
        alerts += found[:LISTED]
        if more := found[LISTED:]:
            summary = f"{len(more)} more alerts of {name}"
            worst = max(more, key=lambda each: each.severity.rank)
            alerts.append(
                Alert(
                    check=name,
                    severity=worst.severity,
                    summary=summary,
                    remedy=worst.remedy,
                    count=len(more),
                    subject="others",
                    path=worst.path.rpartition("/")[0] or worst.path,
                )
            )
    return alerts


def _served(facts: Facts) -> set[str | None]:
    """Return the sizes of live workers; None for one that has not reported yet."""
    return {worker.size for worker in facts.seen.workers if worker.alive}


def _waiting_since(facts: Facts, seconds: float | None) -> datetime | None:
    return None if seconds is None else facts.seen.at - timedelta(seconds=seconds)
