"""The health checks: each judges the facts, and names what is wrong and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from functools import wraps
from typing import TypeAlias
from urllib.parse import quote

from ...plumbing.broker.server_check import SAFE_POLICY, eviction_problem, obstacle, risks
from ..cursors import moment
from ..models import Worker
from .alerts import Alert, Severity, counted
from .facts import Facts
from .thresholds import HealthThresholds

Check: TypeAlias = "Callable[[Facts, HealthThresholds], Iterator[Alert]]"

#: What comes into a queue that grows, by what goes out: a balance that wavers is no growth.
_GROWING = 1.1
#: What comes in messages may have names of any length.
_LONGEST_NAME = 100
#: Alerts of one check that are listed one by one.
LISTED = 20
_REJECTED_REMEDIES = {
    "unknown task": "workers lack this task: install its package there, or start them with its --module",
    "arguments": "they were submitted with another version of the task: install the same version everywhere",
    "unparsable": "something else writes to the streams of the task system, or data were damaged",
    "poison": "every worker that took it died: look at their log before it is submitted again",
}

CHECKS: dict[str, Check] = {}
"""By name, in the order in which their alerts are listed."""


def _check(*, public: bool) -> Callable[[Check], Check]:
    """Register a check. Its alerts get its name.

    Args:
        public: whether those who see the numbers of the installation may see its alerts whole.
    """

    def register(check: Check) -> Check:
        name = check.__name__

        @wraps(check)
        def named(facts: Facts, limits: HealthThresholds) -> Iterator[Alert]:
            return (replace(alert, check=name, public=public) for alert in check(facts, limits))

        CHECKS[name] = named
        return named

    return register


@_check(public=True)
def server_unusable(facts: Facts, limits: HealthThresholds) -> Iterator[Alert]:
    """The task system cannot work on this server."""
    if (problem := obstacle(facts.server)) is not None:
        yield unusable(problem)


def unusable(problem: str) -> Alert:
    """The alert for what keeps the task system from working on the server."""
    return Alert(
        check="server_unusable",
        public=True,
        severity=Severity.CRITICAL,
        summary=f"Redis {problem}",
        remedy="correct the URL of the broker or the server: docs/how-to/choose-a-server.md",
    )


@_check(public=True)
def eviction(facts: Facts, limits: HealthThresholds) -> Iterator[Alert]:
    """Redis may throw tasks away, or has."""
    limit = facts.seen.memory_limit_bytes
    problem = eviction_problem(facts.seen.memory_policy, limit)
    evicted_keys = int(facts.server.info.get("evicted_keys", 0))
    if problem is None and evicted_keys:
        problem = f"Redis has deleted {counted(evicted_keys, 'key', 'keys')} for want of memory since its start"
    if problem is not None:
        may_happen = limit is not None and facts.seen.memory_policy != SAFE_POLICY
        yield Alert(
            severity=Severity.CRITICAL if may_happen else Severity.WARNING,
            summary=problem,
            remedy=f"set `maxmemory-policy {SAFE_POLICY}` in its configuration; caches belong on another server",
            count=max(1, evicted_keys),
        )


@_check(public=True)
def persistence(facts: Facts, limits: HealthThresholds) -> Iterator[Alert]:
    """Redis loses tasks when it is restarted or its machine crashes."""
    yield from _risks(facts, "persistence")


@_check(public=True)
def replication(facts: Facts, limits: HealthThresholds) -> Iterator[Alert]:
    """A failover of Redis may lose more than the last seconds."""
    yield from _risks(facts, "replication")


def _risks(facts: Facts, check: str) -> Iterator[Alert]:
    for risk in risks(facts.server):
        if risk.check == check:
            yield Alert(severity=Severity.WARNING, summary=risk.problem, remedy=risk.remedy)


@_check(public=True)
def memory(facts: Facts, limits: HealthThresholds) -> Iterator[Alert]:
    """Redis comes near the limit at which it refuses new tasks."""
    used, limit = facts.seen.memory_bytes, facts.seen.memory_limit_bytes
    if used is None or not limit or used < limits.memory_warning_share * limit:
        return
    yield Alert(
        severity=Severity.CRITICAL if used >= limits.memory_critical_share * limit else Severity.WARNING,
        summary=f"Redis uses {used / limit:.0%} of its memory: at 100 % it refuses new tasks",
        remedy="find the queue that grows (`diracx-task-run queue list`); add workers, or memory",
    )


@_check(public=True)
def no_scheduler(facts: Facts, limits: HealthThresholds) -> Iterator[Alert]:
    """Nothing periodic is submitted."""
    seen = facts.seen
    if seen.schedules and not seen.scheduler_leads:
        late = seen.schedule_lateness_seconds
        yield Alert(
            severity=Severity.CRITICAL,
            summary=f"no scheduler leads: {counted(seen.schedules, 'schedule is', 'schedules are')} not submitted",
            remedy="start one: `diracx-task-run scheduler`",
            count=seen.schedules,
            since=seen.at - timedelta(seconds=late) if late else None,
            path="/schedules",
        )


@_check(public=True)
def schedules_late(facts: Facts, limits: HealthThresholds) -> Iterator[Alert]:
    """A scheduler leads, and cannot keep up."""
    seen = facts.seen
    if seen.scheduler_leads and seen.schedule_lateness_seconds > limits.late_seconds:
        yield Alert(
            severity=Severity.CRITICAL,
            summary=f"{counted(seen.schedules_late, 'schedule is', 'schedules are')} late, "
            f"the worst by {_time(seen.schedule_lateness_seconds)}",
            remedy="`diracx-task-run schedule list` says which, the log of the scheduler why",
            count=max(1, seen.schedules_late),
            since=seen.at - timedelta(seconds=seen.schedule_lateness_seconds),
            path="/schedules",
        )


@_check(public=False)
def schedules_failing(facts: Facts, limits: HealthThresholds) -> Iterator[Alert]:
    """The leading scheduler cannot submit some schedules: they are off until that is mended."""
    if facts.schedule_problems:
        first, why = min(facts.schedule_problems.items())
        number = len(facts.schedule_problems)
        yield Alert(
            severity=Severity.CRITICAL,
            summary=f"{counted(number, 'schedule', 'schedules')} cannot be submitted: {first}: {why}",
            remedy="`diracx-task-run schedule list` has them all, each with its reason",
            count=number,
            path="/schedules",
        )


@_check(public=True)
def delayed_overdue(facts: Facts, limits: HealthThresholds) -> Iterator[Alert]:
    """Retries and tasks with a time do not come into their queues."""
    seen = facts.seen
    if seen.overdue and seen.delayed_lateness_seconds > limits.late_seconds:
        tasks = counted(seen.overdue, "delayed task is", "delayed tasks are")
        yield Alert(
            severity=Severity.CRITICAL,
            summary=f"{tasks} overdue: no worker or scheduler moves them to their queues",
            remedy="start a worker or a scheduler",
            count=seen.overdue,
            since=seen.at - timedelta(seconds=seen.delayed_lateness_seconds),
            path="/delayed",
        )


@_check(public=True)
def queue_without_worker(facts: Facts, limits: HealthThresholds) -> Iterator[Alert]:
    """Tasks wait, and no worker of their size runs."""
    served = _served(facts)
    for queue in facts.seen.queues:
        if queue.backlog and queue.size not in served and None not in served:
            tasks = counted(queue.backlog, "task waits", "tasks wait")
            yield Alert(
                severity=Severity.CRITICAL,
                summary=f"{queue.name}: {tasks}, and no worker of size {queue.size} runs",
                remedy=f"start one: `diracx-task-run worker --worker-size {queue.size}`",
                count=queue.backlog,
                subject=queue.name,
                since=_waiting_since(facts, queue.oldest_waiting_seconds),
                path=f"/queues/{queue.name}",
            )


@_check(public=False)
def worker_blocked(facts: Facts, limits: HealthThresholds) -> Iterator[Alert]:
    """A task blocks the event loop: nothing else of its worker goes on."""
    for worker in facts.seen.workers:
        if worker.alive and (blocked := worker.blocked) is not None:
            which = f"{blocked.task_name} {blocked.task_id}" if blocked.task_id else "a task"
            yield Alert(
                severity=Severity.CRITICAL,
                summary=f"worker {worker.name}: {which} blocks its event loop",
                remedy="its stack is in `workers --json` and in the log: mend the task; end the process, and run "
                "it with `--hard-limit`",
                subject=worker.name,
                since=blocked.since,
                path="/workers",
            )


@_check(public=True)
def worker_silent(facts: Facts, limits: HealthThresholds) -> Iterator[Alert]:
    """A worker renews its lease and reports nothing."""
    for worker in facts.seen.workers:
        if not worker.alive or worker.blocked is not None or worker.seen is None:
            continue
        silent = (facts.seen.at - worker.seen).total_seconds()
        if silent > limits.silent_seconds:
            yield Alert(
                severity=Severity.CRITICAL,
                summary=f"worker {worker.name} lives, but has been silent for {_time(silent)}",
                remedy="see its log: a task blocks it, or it may not write to the server",
                subject=worker.name,
                since=worker.seen,
                path="/workers",
            )


@_check(public=True)
def tasks_failing(facts: Facts, limits: HealthThresholds) -> Iterator[Alert]:
    """A class of tasks fails in most of its attempts."""
    for each in facts.stats:
        attempts, rate = each.done + each.failed, each.failure_rate or 0.0
        if attempts < limits.failure_attempts or rate < limits.failure_warning_share:
            continue
        yield Alert(
            severity=Severity.CRITICAL if rate >= limits.failure_critical_share else Severity.WARNING,
            summary=f"{each.task_name} fails in {rate:.0%} of its attempts: "
            f"{each.failed:,} of {attempts:,} within the past hour",
            remedy=f"`diracx-task-run tasks stats --task {each.task_name} --failures 3` has the errors",
            count=each.failed,
            subject=each.task_name,
            path=f"/failures?task={quote(each.task_name, safe='')}",
        )


@_check(public=False)
def configuration(facts: Facts, limits: HealthThresholds) -> Iterator[Alert]:
    """Processes go on with an earlier configuration, or with different ones."""
    wrong = [each for each in facts.configurations if each.problems]
    digests = {each.digest for each in facts.configurations}
    if wrong:
        since = [each.problems_since for each in wrong if each.problems_since is not None]
        yield Alert(
            severity=Severity.CRITICAL,
            summary=f"{counted(len(wrong), 'process goes', 'processes go')} on with an earlier configuration, as "
            f"what is written now is wrong: {wrong[0].problems[0][:200]}",
            remedy="`diracx-task-run config check` has every mistake with its line",
            count=len(wrong),
            since=moment(min(since)) if since else None,
            path="/configuration",
        )
    elif len(digests) > 1:
        newest = max(each.since for each in facts.configurations)
        if facts.seen.at.timestamp() - newest > limits.configuration_seconds:
            yield Alert(
                severity=Severity.WARNING,
                summary=f"{len(digests)} different configurations are in force",
                remedy="`diracx-task-run config in-force` says which process has which",
                count=len(digests),
                since=moment(newest),
                path="/configuration",
            )


@_check(public=True)
def backlog(facts: Facts, limits: HealthThresholds) -> Iterator[Alert]:
    """The workers of a queue do not keep up with it."""
    served = _served(facts)
    for queue in facts.seen.queues:
        if not queue.backlog or (queue.size not in served and None not in served):
            continue
        waits = queue.oldest_waiting_seconds or 0.0
        comes, goes = queue.in_per_second or 0.0, queue.out_per_second or 0.0
        growing = queue.backlog >= limits.growing_backlog and comes > _GROWING * goes
        if not growing and (waits <= limits.wait_seconds or queue.priority == "background"):
            continue
        tasks = counted(queue.backlog, "task waits", "tasks wait")
        how = f", and {comes - goes:.1f} more a second come in than go out" if growing else ""
        yield Alert(
            severity=Severity.WARNING,
            summary=f"{queue.name}: {tasks}, the first for {_time(waits)}{how}",
            remedy="all slots are taken: `diracx-task-run running` says by what; add workers, or `--processes`",
            count=queue.backlog,
            subject=queue.name,
            since=_waiting_since(facts, queue.oldest_waiting_seconds),
            path=f"/queues/{queue.name}",
        )


@_check(public=False)
def tasks_overdue(facts: Facts, limits: HealthThresholds) -> Iterator[Alert]:
    """Tasks go on after their time limit, or after they were cancelled."""
    for worker, task in facts.running:
        since = task.get("overdue_since")
        if since is None or facts.seen.at.timestamp() - since < limits.overdue_task_seconds:
            continue
        yield Alert(
            severity=Severity.WARNING,
            summary=f"{task['task_name']} {task['task_id']} goes on after its time limit or its cancellation",
            remedy=f"its slot of {worker} is lost until it ends: mend the task, or use `--hard-limit`",
            subject=task["task_id"],
            since=moment(since),
            path="/running",
        )


@_check(public=False)
def poison_candidates(facts: Facts, limits: HealthThresholds) -> Iterator[Alert]:
    """A running task has been with workers that died."""
    for _, task in facts.running:
        if task["deliveries"] >= limits.deliveries:
            yield Alert(
                severity=Severity.WARNING,
                summary=f"{task['task_name']} {task['task_id']} was handed out {task['deliveries']} times: the "
                "workers that had it died",
                remedy="look at the log of those workers; cancel it if it is what killed them",
                count=task["deliveries"],
                subject=task["task_id"],
                since=moment(task["since"]),
                path="/running",
            )


@_check(public=False)
def messages_rejected(facts: Facts, limits: HealthThresholds) -> Iterator[Alert]:
    """Messages came within the past hour that no worker could execute."""
    for reason in dict.fromkeys(each.type for each in facts.rejected):
        these = [each for each in facts.rejected if each.type == reason]
        names = list(dict.fromkeys(each.task_name[:_LONGEST_NAME] or "no task" for each in these))
        which = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        yield Alert(
            severity=Severity.CRITICAL if reason == "poison" else Severity.WARNING,
            summary=f"{counted(len(these), 'message', 'messages')} could not be executed ({reason}): {which}",
            remedy=_REJECTED_REMEDIES.get(reason, "`diracx-task-run dlq list` has them"),
            count=len(these),
            subject=reason,
            since=these[-1].at,
            path="/failures",
        )


@_check(public=False)
def locks_held(facts: Facts, limits: HealthThresholds) -> Iterator[Alert]:
    """A task holds a lock for long while others wait for it."""
    for lock in facts.contended:
        held = (facts.seen.at - lock.since).total_seconds()
        if held > limits.lock_held_seconds:
            yield Alert(
                severity=Severity.WARNING,
                summary=f"{lock.key}: {lock.task_name} {lock.task_id} has held it for {_time(held)}, and "
                f"{counted(lock.waiters, 'task waits', 'tasks wait')} for it",
                remedy=f"`diracx-task-run cancel {lock.task_id}` if it is not needed; give its class a time limit",
                count=lock.waiters,
                subject=lock.key,
                since=lock.since,
                path="/locks",
            )


@_check(public=True)
def groups_stuck(facts: Facts, limits: HealthThresholds) -> Iterator[Alert]:
    """Callback groups have shown no sign of life for a day."""
    if facts.seen.groups_stuck:
        yield Alert(
            severity=Severity.WARNING,
            summary=f"{counted(facts.seen.groups_stuck, 'callback group', 'callback groups')} failed without "
            "a callback for that, or had no child that ended for a day",
            remedy="`diracx-task-run group list` has them; submit failed children again, or fire the callback",
            count=facts.seen.groups_stuck,
            path="/groups",
        )


@_check(public=True)
def dead_letters_waiting(facts: Facts, limits: HealthThresholds) -> Iterator[Alert]:
    """Dead letters wait in Redis."""
    seen = facts.seen
    if seen.dead_letters_waiting:
        dead_letters = counted(seen.dead_letters_waiting, "dead letter waits", "dead letters wait")
        yield Alert(
            severity=Severity.WARNING,
            summary=f"{dead_letters} in Redis: no worker has stored them in the database",
            remedy="`diracx-task-run dlq waiting` has them; workers with DIRACX_DB_URL_TASKDB import them: see "
            "that one runs, that this database answers, and whether the log says that it refuses them",
            count=seen.dead_letters_waiting,
            since=seen.dead_letters_waiting_since,
            path="/dead-letters",
        )


@_check(public=True)
def workers_dead(facts: Facts, limits: HealthThresholds) -> Iterator[Alert]:
    """Workers have died within the last three minutes; others take over what they ran."""
    dead: list[Worker] = [worker for worker in facts.seen.workers if not worker.alive]
    if dead:
        names = ", ".join(worker.name for worker in dead[:3]) + (", …" if len(dead) > 3 else "")
        yield Alert(
            severity=Severity.WARNING,
            summary=f"{counted(len(dead), 'worker is', 'workers are')} dead: {names}",
            remedy="others take over what they ran; find out what they died of: their log, the kernel's (memory?)",
            count=len(dead),
            since=_earliest([worker.lease_until or worker.seen for worker in dead]),
            path="/workers",
        )


def describe(check: str) -> str:
    """Describe what a check looks for, in a line without names."""
    found = CHECKS.get(check)
    return check.replace("_", " ") if found is None else (found.__doc__ or "").splitlines()[0].rstrip(".")


def find_alerts(facts: Facts, limits: HealthThresholds) -> list[Alert]:
    """Run all health checks; of each return the first 20 alerts, and one that counts the rest."""
    alerts: list[Alert] = []
    for name, check in CHECKS.items():
        found = list(check(facts, limits))
        alerts += found[:LISTED]
        if more := found[LISTED:]:
            summary = f"{len(more)} more of the kind {name}"
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
    """Sizes of the workers that live; None among them: of one that has not reported yet."""
    return {worker.size for worker in facts.seen.workers if worker.alive}


def _waiting_since(facts: Facts, seconds: float | None) -> datetime | None:
    return None if seconds is None else facts.seen.at - timedelta(seconds=seconds)


def _earliest(moments: list[datetime | None]) -> datetime | None:
    return min((each for each in moments if each is not None), default=None)


def _time(seconds: float) -> str:
    for length, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
