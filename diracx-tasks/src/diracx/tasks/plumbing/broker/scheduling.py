"""Schedules in Redis: plans and occurrences, the lead of one scheduler, and reading all of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import chain
from typing import TYPE_CHECKING, Any

from . import keys
from .locking import acquire, extend, release
from .scripts import pack, script
from .sizes import in_calls
from .stored import SCANNED, moment_of, ms_of, reading, text_of, typed

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from .requests import LockSpec, Occurrence, PlanStep

#: Channel that announces a released lead.
LEADER_CHANNEL = keys.LEADER
#: Channel that wakes the leader, for an earlier due time or after a pause.
WAKE_CHANNEL = keys.WAKE_SCHEDULER
_PROBLEMS_BATCH = 250
#: Interval of the polls for the end of the lead of a scheduler of version 0.7.
_POLL_MS = 400

#: Schedules that one script call pauses.
PAUSE_BATCH = 500


async def plan(redis: Redis, token: str, steps: Sequence[PlanStep]) -> bool:
    """Update planned schedules, see lua/plan.lua. False when another scheduler leads."""
    return bool(await script("plan")(redis, args=[token, pack(steps)]) == 1)


async def occur(redis: Redis, token: str, occurrences: Sequence[Occurrence]) -> list[int] | None:
    """Submit occurrences of schedules.

    Returns:
        The reply for each, see lua/occur.lua; None when another scheduler leads.
    """
    replies: list[int] = await script("occur")(redis, args=[token, pack(occurrences)])
    return None if replies == [-1] else replies


async def run_now(redis: Redis, schedule: str, stream: str, task_id: str, data: bytes) -> str | None:
    """Submit a schedule's task at once, unless an earlier one still waits; its id is returned then."""
    waiting: bytes = await script("run_now")(redis, args=[schedule, stream, task_id, data])
    return waiting.decode() or None


async def pause(redis: Redis, schedules: Sequence[str], paused: bool) -> list[str]:
    """Pause schedules, or resume them. Returns those whose state has changed."""
    changed: list[str] = []
    for part in in_calls(schedules, PAUSE_BATCH, lambda _: 0):
        replies = await script("pause")(redis, args=[int(paused), pack(part)])
        changed += [id_ for id_, reply in zip(part, replies, strict=True) if reply == 1]
    return changed


# --- the lead -----------------------------------------------------------------------------------------------


def _lead(token: str, lease_ms: int) -> list[LockSpec]:
    """Leader locks of this version and of 0.7, so that a single scheduler of either version leads."""
    locks = (keys.LEADER, keys.PUBLISHED_LEADER)
    return [{"kind": "mutex", "key": key, "owner": token, "ttl_ms": lease_ms} for key in locks]


async def take_lead(redis: Redis, token: str, lease_ms: int) -> bool:
    """Take the lead if it is free, or held with this token. False when another scheduler leads."""
    lead = _lead(token, lease_ms)
    return bool(await acquire(redis, lead)) or all(await extend(redis, lead))


async def renew_lead(redis: Redis, token: str, lease_ms: int) -> bool:
    """Renew the lead. False when it is lost."""
    return all(await extend(redis, _lead(token, lease_ms)))


async def release_lead(redis: Redis, token: str, lease_ms: int) -> None:
    """Release the lead, and notify standby schedulers. Does nothing when it is not held with this token."""
    if await release(redis, _lead(token, lease_ms)):
        await redis.execute_command("PUBLISH", keys.LEADER, "free")


async def lead_left_ms(redis: Redis) -> int:
    """Remaining lease of the leading scheduler (ms); below zero when there is no leader."""
    left_ms: int = await redis.execute_command("PTTL", keys.LEADER)
    if left_ms < 0:  # 0.7 does not announce a released lead
        left_ms = min(_POLL_MS, await redis.execute_command("PTTL", keys.PUBLISHED_LEADER))
    return left_ms


async def has_leader(redis: Redis) -> bool:
    """True if a scheduler leads."""
    return bool(await redis.execute_command("EXISTS", keys.LEADER))


# --- stored schedules ---------------------------------------------------------------------------------------


async def paused_schedules(redis: Redis) -> list[str]:
    """Ids of paused schedules."""
    return [text_of(name) for name in await redis.execute_command("HKEYS", keys.PAUSED)]


async def fingerprints(redis: Redis) -> dict[bytes, bytes]:
    """Fingerprint of the rule from which the next run was computed, by schedule."""
    return {name: value async for name, value in redis.hscan_iter(keys.FINGERPRINTS, count=SCANNED)}


async def next_runs(redis: Redis) -> dict[str, int]:
    """Due time of each schedule (ms)."""
    found = redis.zscan_iter(keys.NEXT_RUNS, count=SCANNED)
    return {text_of(schedule): ms_of(str(due)) async for schedule, due in found}


async def next_run(redis: Redis, schedule: str) -> int | None:
    """Due time of a schedule (ms); None when it has no next run."""
    stored = await redis.execute_command("ZSCORE", keys.NEXT_RUNS, schedule)
    return None if stored is None else ms_of(stored)


async def stored_schedules(redis: Redis) -> set[bytes]:
    """Ids of all schedules with stored data other than a pause."""
    stored: set[bytes] = {name async for name, _ in redis.zscan_iter(keys.NEXT_RUNS, count=SCANNED)}
    for key in (keys.FINGERPRINTS, keys.LAST_RUNS, keys.OUTCOMES, keys.PROBLEMS):
        stored |= {name async for name, _ in redis.hscan_iter(key, count=SCANNED)}
    return stored


async def schedule_problems(redis: Redis) -> dict[str, str]:
    """Reason for which the leader cannot submit a schedule, by schedule."""
    found: Any = await redis.execute_command("HGETALL", keys.PROBLEMS)
    pairs = found.items() if isinstance(found, Mapping) else zip(found[::2], found[1::2], strict=True)
    return {text_of(schedule): text_of(problem) for schedule, problem in pairs}


async def publish_problems(redis: Redis, problems: Mapping[str, str]) -> None:
    """Replace the published problems of schedules."""
    items = list(problems.items())
    async with redis.pipeline(transaction=False) as pipe:
        pipe.execute_command("UNLINK", keys.PROBLEMS)
        for first in range(0, len(items), _PROBLEMS_BATCH):
            pipe.execute_command(
                "HSET", keys.PROBLEMS, *chain.from_iterable(items[first : first + _PROBLEMS_BATCH])
            )
        await pipe.execute()


# --- for operators ------------------------------------------------------------------------------------------


class Activity(StrEnum):
    """State of the last occurrence when it has not ended."""

    WAITING = "waiting"
    """In its queue, or for a lock or quota."""
    RETRYING = "retrying"
    """Between a failed attempt and the next."""
    RUNNING = "running"
    """Held by a worker."""


@dataclass(frozen=True)
class Outcome:
    """Outcome of the last occurrence that ended, or of its last attempt."""

    task_id: str
    ok: bool
    ended: datetime
    seconds: float
    """Run time."""
    error: str | None = None
    """Type of the exception."""
    message: str | None = None
    retry_at: datetime | None = None
    """Time of the next attempt; None when the task has ended."""


@dataclass(frozen=True)
class StoredSchedules:
    """All stored data of schedules, by schedule id."""

    next_runs: Mapping[str, int]
    fingerprints: Mapping[str, str]
    last_runs: Mapping[str, tuple[str, str, str, int]]
    outcomes: Mapping[str, Outcome]
    paused: Mapping[str, int]
    problems: Mapping[str, str]


async def read_schedules(redis: Redis) -> StoredSchedules:
    """Read all stored data of schedules, in short calls whatever their number."""
    hashes = (keys.FINGERPRINTS, keys.LAST_RUNS, keys.OUTCOMES, keys.PAUSED, keys.PROBLEMS)
    known, last_runs, outcomes, paused, problems = [
        {text_of(name): text_of(value) async for name, value in redis.hscan_iter(key, count=SCANNED)}
        for key in hashes
    ]
    # Read after the fingerprints: a schedule planned meanwhile must not seem to have no next run.
    due = await next_runs(redis)
    with reading(keys.LAST_RUNS):
        last = {id_: _last_run(text) for id_, text in last_runs.items()}
    with reading(keys.OUTCOMES):
        ended = {id_: _outcome(text) for id_, text in outcomes.items()}
    with reading(keys.PAUSED):
        since = {id_: int(text) for id_, text in paused.items()}
    return StoredSchedules(due, known, last, ended, since, problems)


def _last_run(text: str) -> tuple[str, str, str, int]:
    stream, entry, task, due = text.split(" ")
    return stream, entry, task, int(due)


def _outcome(text: str) -> Outcome:
    ended_ms, _, outcome_json = text.partition(" ")
    fields: dict[str, Any] = json.loads(outcome_json)
    ended, retry_seconds = moment_of(int(ended_ms) / 1000), fields.get("retry_seconds")
    retry_at = None if retry_seconds is None else ended + timedelta(seconds=retry_seconds)
    return typed(Outcome, fields | {"ended": ended, "retry_at": retry_at})


async def activities(redis: Redis, stored: StoredSchedules) -> dict[str, Activity]:
    """States of the occurrences that have not ended."""
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
    replies = zip(delayed, entries, pending, strict=True)
    return {id_: _activity(*reply) for id_, reply in zip(open_, replies, strict=True)}


def _activity(delayed: bytes | str | None, entry: Any, pending: Any) -> Activity:
    if delayed is not None:
        reason = text_of(delayed).split(" ", 2)[1]
        return Activity.RETRYING if reason == "retry" else Activity.WAITING
    # A stream without a consumer group has no pending entries. A missing entry was granted the lock it waited for,
    # and has another id: a worker has it, or will get it soon.
    in_stream = bool(entry) and not isinstance(entry, Exception)
    return Activity.WAITING if in_stream and (isinstance(pending, Exception) or not pending) else Activity.RUNNING
