"""Read model of schedules: their state from Redis, code and configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING

from ..broker.scheduling import Activity, Outcome, StoredSchedules, activities, read_schedules
from ..broker.stored import moment_of
from ..config import describe_schedule
from ..task_names import resolve_task_name
from .occurrences import ScheduledTask, iter_schedules

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from ..base_task import BaseTask
    from ..config import TasksConfig


class State(StrEnum):
    """State of a schedule."""

    ACTIVE = "active"
    """Has a next run."""
    PAUSED = "paused"
    """Paused by an operator."""
    FINISHED = "finished"
    """Its rule has no further run."""
    DISABLED = "disabled"
    """Disabled by code or configuration, or without a rule."""
    FAILING = "failing"
    """The leader cannot submit it; see `problem`. It is tried again once a minute."""
    UNPLANNED = "unplanned"
    """Not yet planned by a scheduler."""
    UNKNOWN = "unknown"
    """Stored in Redis, but missing in the code and configuration of this process."""


@dataclass(frozen=True)
class ScheduleState:
    """One schedule. All times in UTC."""

    id: str
    state: State
    name: str
    """Registry name of the task."""
    instance: str | None
    vo: str | None
    rule: str | None
    """`every 30 s`, `cron …`, `rrule …`."""
    missed: str | None
    source: str | None
    """Layer that determines the schedule: `code`, `common` or `vo NAME`; None if unknown."""
    next_run: datetime | None
    last_run: datetime | None
    """Due time of the last occurrence; for `run now`, time of its submission."""
    last_task_id: str | None
    activity: Activity | None
    outcome: Outcome | None
    paused_since: datetime | None
    problem: str | None
    """Reason for which it cannot be submitted."""


async def schedules(
    redis: Redis, registry: Mapping[str, type[BaseTask]], config: TasksConfig, vos: Iterable[str]
) -> list[ScheduleState]:
    """Read all schedules, ordered by id: those of code and configuration, disabled or not, and others in Redis."""
    instances = {found.id: found for found in iter_schedules(registry, config, vos)}
    stored = await read_schedules(redis)
    running = await activities(redis, stored)
    known = {*instances, *stored.next_runs, *stored.fingerprints, *stored.paused}
    return [_state(id_, instances.get(id_), stored, running.get(id_)) for id_ in sorted(known)]


def _state(
    id_: str, found: ScheduledTask | None, stored: StoredSchedules, activity: Activity | None
) -> ScheduleState:
    name, instance, vo = (found.name, found.instance, found.vo) if found else _parts(id_)
    last = stored.last_runs.get(id_)
    paused, due = stored.paused.get(id_), stored.next_runs.get(id_)
    return ScheduleState(
        id=id_,
        state=_state_of(id_, found, stored),
        name=name,
        instance=instance,
        vo=vo,
        rule=describe_schedule(found.rule) if found else None,
        missed=found.missed if found else None,
        source=found.source if found else None,
        next_run=None if due is None or paused is not None else moment_of(due / 1000),
        last_run=None if last is None else moment_of(last[3] / 1000),
        last_task_id=None if last is None else last[2],
        activity=activity,
        outcome=stored.outcomes.get(id_),
        paused_since=None if paused is None else moment_of(paused / 1000),
        problem=stored.problems.get(id_),
    )


def _state_of(id_: str, found: ScheduledTask | None, stored: StoredSchedules) -> State:
    if found is None:
        return State.UNKNOWN
    if not found.enabled:
        return State.DISABLED
    if id_ in stored.paused:
        return State.PAUSED
    if id_ in stored.problems:
        return State.FAILING
    if id_ in stored.next_runs:
        return State.ACTIVE
    return State.FINISHED if id_ in stored.fingerprints else State.UNPLANNED


def _parts(id_: str) -> tuple[str, str | None, str | None]:
    """Name, instance and VO of an id."""
    rest, _, vo = id_.partition("/")
    name, _, instance = rest.partition("@")
    return name, instance or None, vo or None


def matching(patterns: Sequence[str], ids: Iterable[str]) -> tuple[list[str], list[str]]:
    """Match ids with patterns (`*`, `?`, `[…]`); also returns the patterns without a match.

    A pattern may be an id without its category, like the name of a task.

    Raises:
        AmbiguousTaskNameError: when several ids match such a pattern.
    """
    from fnmatch import fnmatchcase

    known = dict.fromkeys(sorted(ids))
    found: dict[str, list[str]] = {}
    for pattern in patterns:
        named = resolve_task_name(pattern, known)
        found[pattern] = [named] if named is not None else [id_ for id_ in known if fnmatchcase(id_, pattern)]
    return sorted({id_ for ids_ in found.values() for id_ in ids_}), [p for p, ids_ in found.items() if not ids_]
