"""What there is to know about schedules: one look at Redis, code and configuration, for whoever shows it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from ..broker import keys
from ..broker.stored import SCANNED, ms_of, reading
from ..config import describe_schedule
from ..task_names import resolve_task_name
from .occurrences import ScheduledTask, every_instance, source_of

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from ..base_task import BaseTask
    from ..config import TasksConfig


class State(StrEnum):
    """What will become of a schedule."""

    ACTIVE = "active"
    """It has a next run."""
    PAUSED = "paused"
    """Somebody has paused it."""
    FINISHED = "finished"
    """Its rule has come to its end."""
    DISABLED = "disabled"
    """Switched off by code or configuration, or without a rule."""
    FAILING = "failing"
    """The leader cannot submit it; see `problem`. It is tried again once a minute."""
    UNPLANNED = "unplanned"
    """No scheduler has seen it yet."""
    UNKNOWN = "unknown"
    """Known to a scheduler, or paused once, and not to the code and configuration at hand."""


class Activity(StrEnum):
    """What the last occurrence does at the moment, when it has not ended."""

    WAITING = "waiting"
    """In its queue, or for a lock or quota."""
    RETRYING = "retrying"
    """Between a failed attempt and the next."""
    RUNNING = "running"
    """In the hands of a worker."""


@dataclass(frozen=True)
class Outcome:
    """How the last occurrence that ended, ended; or its last attempt."""

    task_id: str
    ok: bool
    ended: datetime
    seconds: float
    """How long it took."""
    error: str | None = None
    """Type of the exception."""
    message: str | None = None
    retry_at: datetime | None = None
    """When it is tried again; None when it has ended for good."""


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
    """Who says when it is due, or that it is not scheduled: `code`, `common` or `vo NAME`; None where unknown."""
    next_run: datetime | None
    last_run: datetime | None
    """When the last occurrence was due; when it was submitted, if that was by hand."""
    last_task_id: str | None
    activity: Activity | None
    outcome: Outcome | None
    paused_since: datetime | None
    problem: str | None
    """Why it cannot be submitted."""


async def schedules(
    redis: Redis, registry: Mapping[str, type[BaseTask]], config: TasksConfig, vos: Iterable[str]
) -> list[ScheduleState]:
    """All schedules by id: those of code and configuration, switched off or not, and what only Redis knows."""
    instances = {found.id: found for found in every_instance(registry, config, vos)}
    stored = await _read(redis)
    activities = await _activities(redis, stored)
    known = {*instances, *stored.next_runs, *stored.fingerprints, *stored.paused}
    return [_state(id_, instances.get(id_), config, stored, activities.get(id_)) for id_ in sorted(known)]


async def somebody_leads(redis: Redis) -> bool:
    """Whether a scheduler leads."""
    return bool(await redis.execute_command("EXISTS", keys.LEADER))


@dataclass(frozen=True)
class _Stored:
    next_runs: Mapping[str, int]
    fingerprints: Mapping[str, str]
    last_runs: Mapping[str, tuple[str, str, str, int]]
    outcomes: Mapping[str, Outcome]
    paused: Mapping[str, int]
    problems: Mapping[str, str]


async def _read(redis: Redis) -> _Stored:
    """Key by key and part by part: however many schedules there are, no call takes long."""
    hashes = (keys.FINGERPRINTS, keys.LAST_RUNS, keys.OUTCOMES, keys.PAUSED, keys.PROBLEMS)
    fingerprints, last_runs, outcomes, paused, problems = [
        {_text(name): _text(value) async for name, value in redis.hscan_iter(key, count=SCANNED)} for key in hashes
    ]
    # After the fingerprints: what is planned meanwhile must not look as if it had no run left.
    ranked = redis.zscan_iter(keys.NEXT_RUNS, count=SCANNED)
    next_runs = {_text(name): ms_of(str(due)) async for name, due in ranked}
    with reading(keys.LAST_RUNS):
        last = {id_: _last_run(text) for id_, text in last_runs.items()}
    with reading(keys.OUTCOMES):
        ended = {id_: _outcome(text) for id_, text in outcomes.items()}
    with reading(keys.PAUSED):
        since = {id_: int(text) for id_, text in paused.items()}
    return _Stored(next_runs, fingerprints, last, ended, since, problems)


def _text(value: bytes | str) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _last_run(text: str) -> tuple[str, str, str, int]:
    stream, entry, task, due = text.split(" ")
    return stream, entry, task, int(due)


def _outcome(text: str) -> Outcome:
    ended_ms, _, told = text.partition(" ")
    fields: dict[str, Any] = json.loads(told)
    ended, retry_seconds = _moment(int(ended_ms)), fields.get("retry_seconds")
    retry_at = None if retry_seconds is None else ended + timedelta(seconds=retry_seconds)
    known = {name: value for name, value in fields.items() if name in Outcome.__dataclass_fields__}
    return Outcome(ended=ended, **known, retry_at=retry_at)


def _moment(ms: int) -> datetime:
    return datetime.fromtimestamp(ms / 1000, UTC)


async def _activities(redis: Redis, stored: _Stored) -> dict[str, Activity]:
    """What those occurrences do that have not ended."""
    open_ = {
        id_: last
        for id_, last in stored.last_runs.items()
        if (ended := stored.outcomes.get(id_)) is None or ended.task_id != last[2] or ended.retry_at is not None
    }
    if not open_:
        return {}
    async with redis.pipeline(transaction=True) as pipe:
        pipe.hmget(keys.DELAYED_DATA, [task for _, _, task, _ in open_.values()])
        for stream, entry, _, _ in open_.values():
            pipe.xrange(stream, entry, entry)
            pipe.xpending_range(stream, keys.GROUP, entry, entry, 1)
        delayed, *rest = await pipe.execute(raise_on_error=False)
    entries, pending = rest[::2], rest[1::2]
    return {
        id_: _activity(*what) for id_, what in zip(open_, zip(delayed, entries, pending, strict=True), strict=True)
    }


def _activity(delayed: bytes | str | None, entry: Any, pending: Any) -> Activity:
    if delayed is not None:
        reason = _text(delayed).split(" ", 2)[1]
        return Activity.RETRYING if reason == "retry" else Activity.WAITING
    # A stream without a group has no pending entries. An entry that is gone has been woken from its wait for a
    # lock, and is under another id with a worker, or will be in a moment.
    in_stream = bool(entry) and not isinstance(entry, Exception)
    return Activity.WAITING if in_stream and (isinstance(pending, Exception) or not pending) else Activity.RUNNING


def _state(
    id_: str, found: ScheduledTask | None, config: TasksConfig, stored: _Stored, activity: Activity | None
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
        source=source_of(found, config) if found else None,
        next_run=None if due is None or paused is not None else _moment(due),
        last_run=None if last is None else _moment(last[3]),
        last_task_id=None if last is None else last[2],
        activity=activity,
        outcome=stored.outcomes.get(id_),
        paused_since=None if paused is None else _moment(paused),
        problem=stored.problems.get(id_),
    )


def _state_of(id_: str, found: ScheduledTask | None, stored: _Stored) -> State:
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
    """The ids that the patterns (`*`, `?`, `[…]`) stand for, and the patterns that stand for none.

    An id may be given without its category, like the name of a task.

    Raises:
        AmbiguousTaskNameError: when that fits several.
    """
    from fnmatch import fnmatchcase

    known = sorted(ids)
    found: dict[str, list[str]] = {}
    for pattern in patterns:
        named = resolve_task_name(pattern, known)
        found[pattern] = [named] if named is not None else [id_ for id_ in known if fnmatchcase(id_, pattern)]
    return sorted({id_ for ids_ in found.values() for id_ in ids_}), [p for p, ids_ in found.items() if not ids_]
