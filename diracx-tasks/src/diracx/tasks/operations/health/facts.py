"""Reads the input of the health checks, in a fixed number of round trips."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from redis.asyncio import Redis

from ...plumbing.broker.locking import waiter_counts
from ...plumbing.broker.scheduling import schedule_problems
from ...plumbing.broker.server_check import Server, read_server
from ...plumbing.broker.stored import moment_of
from ...plumbing.config.active import ActiveConfig, active_configs
from ...plumbing.persistence.dead_letter import DeadLetterReason
from ...plumbing.worker.reporter import REJECTED
from ..models import Failure, Snapshot, TaskStats
from ..processes import ReportedTask, reported_running
from ..queued import snapshot
from ..statistics import failures, stats
from .thresholds import HealthThresholds

#: Maximum number of checked locks, those of the longest running tasks.
_LOCKS = 200
_FAILURES = 100
_PROBLEM_LENGTH = 200


@dataclass(frozen=True, slots=True)
class Contended:
    """A lock that a task holds and others wait for."""

    key: str
    task_id: str
    task_name: str
    since: datetime
    """Start of its task."""
    waiters: int


@dataclass(frozen=True, slots=True)
class Facts:
    """Input of the health checks: the state of the whole system at one moment."""

    seen: Snapshot
    stats: list[TaskStats]
    """Statistics of the past hour."""
    configurations: list[ActiveConfig]
    limits: HealthThresholds
    running: list[tuple[str, ReportedTask]] = field(default_factory=list)
    """Running tasks: name of the worker and its report about the task."""
    contended: list[Contended] = field(default_factory=list)
    rejected: list[Failure] = field(default_factory=list)
    """Messages of the past hour that could not be executed, newest first."""
    schedule_problems: dict[str, str] = field(default_factory=dict)
    """Schedule -> why it cannot be submitted."""
    server: Server = field(default_factory=Server)


async def read_facts(redis: Redis, limits: HealthThresholds) -> Facts:
    """Read all facts."""
    seen = await snapshot(redis)
    problems = await schedule_problems(redis)
    alive = [worker.name for worker in seen.workers if worker.alive]
    running = [(name, task) for name, tasks in (await reported_running(redis, alive)).items() for task in tasks]
    counted = await stats(redis, "hour")
    rejected = next((each.dead for each in counted if each.task_name == REJECTED), 0)
    return Facts(
        seen=seen,
        stats=[each for each in counted if each.task_name != REJECTED],
        configurations=await active_configs(redis),
        limits=limits,
        running=running,
        contended=await _contended(redis, running),
        rejected=await _rejected(redis, seen) if rejected else [],
        schedule_problems={schedule: problem[:_PROBLEM_LENGTH] for schedule, problem in problems.items()},
        server=await read_server(redis),
    )


async def _contended(redis: Redis, running: list[tuple[str, ReportedTask]]) -> list[Contended]:
    holders = sorted(
        ((task.since, key, task) for _, task in running for key, _ in task.locks),
        key=lambda held: (held[0], held[1]),
    )[:_LOCKS]
    waiting = await waiter_counts(redis, [key for _, key, _ in holders])
    return [
        Contended(key, task.task_id, task.task_name, moment_of(since), waiters)
        for (since, key, task), waiters in zip(holders, waiting, strict=True)
        if waiters
    ]


async def _rejected(redis: Redis, seen: Snapshot) -> list[Failure]:
    reasons = {str(reason) for reason in DeadLetterReason}
    latest = (await failures(redis, limit=_FAILURES)).items
    return [each for each in latest if each.type in reasons and (seen.at - each.at).total_seconds() < 3600]
