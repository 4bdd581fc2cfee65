"""Reads what health checks judge: a fixed number of round trips, however much is queued."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from redis.asyncio import Redis

from ...plumbing.broker.locking import waiter_counts
from ...plumbing.broker.scheduling import schedule_problems
from ...plumbing.broker.server_check import Server, read_server
from ...plumbing.config.active import ActiveConfig, active_configs
from ...plumbing.persistence.dead_letter import DeadLetterReason
from ...plumbing.worker.reporter import REJECTED
from ..cursors import moment
from ..models import Failure, Snapshot, TaskStats
from ..processes import reported_running
from ..queued import snapshot
from ..statistics import failures, stats

#: Locks of long-running tasks that are looked at.
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
    """Time when its task began."""
    waiters: int


@dataclass(frozen=True, slots=True)
class Facts:
    """The whole system at one moment, as far as the server knows it."""

    seen: Snapshot
    stats: list[TaskStats]
    """Of the past hour."""
    configurations: list[ActiveConfig]
    running: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Worker, and what it says of a task that it runs."""
    contended: list[Contended] = field(default_factory=list)
    rejected: list[Failure] = field(default_factory=list)
    """Messages of the past hour that could not be executed, the newest first."""
    schedule_problems: dict[str, str] = field(default_factory=dict)
    """Schedule -> why it cannot be submitted."""
    server: Server = field(default_factory=Server)


async def read_facts(redis: Redis) -> Facts:
    """All facts.

    Raises:
        redis.exceptions.RedisError: when the server does not answer, or refuses.
    """
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
        running=running,
        contended=await _contended(redis, running),
        rejected=await _rejected(redis, seen) if rejected else [],
        schedule_problems={schedule: problem[:_PROBLEM_LENGTH] for schedule, problem in problems.items()},
        server=await read_server(redis),
    )


async def _contended(redis: Redis, running: list[tuple[str, dict[str, Any]]]) -> list[Contended]:
    holders = sorted(
        ((task["since"], key, task) for _, task in running for key, _ in task["locks"]),
        key=lambda held: (held[0], held[1]),
    )[:_LOCKS]
    waiting = await waiter_counts(redis, [key for _, key, _ in holders])
    return [
        Contended(key, task["task_id"], task["task_name"], moment(since), waiters)
        for (since, key, task), waiters in zip(holders, waiting, strict=True)
        if waiters
    ]


async def _rejected(redis: Redis, seen: Snapshot) -> list[Failure]:
    reasons = {str(reason) for reason in DeadLetterReason}
    latest = (await failures(redis, limit=_FAILURES)).items
    return [each for each in latest if each.type in reasons and (seen.at - each.at).total_seconds() < 3600]
