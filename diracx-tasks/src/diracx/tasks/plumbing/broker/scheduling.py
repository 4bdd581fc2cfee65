"""Schedules in Redis: their plan, their occurrences, the lead of one scheduler, and how all of it is read."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import chain
from typing import TYPE_CHECKING, Any

from . import keys
from .locking import acquire, extend, release
from .scripts import pack, script
from .sizes import in_calls
from .stored import SCANNED, moment_of, ms_of, reading, text_of

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from .requests import LockSpec, Occurrence, PlanStep

#: Says that nobody leads any more.
LEADER_CHANNEL = keys.LEADER
#: Says that something earlier is due now, or is paused no more.
WAKE_CHANNEL = keys.WAKE_SCHEDULER
_PROBLEMS_BATCH = 250
#: How often to look whether a scheduler of version 0.7 leads no more.
_LOOK_MS = 400

#: Schedules that one script call pauses.
PAUSE_BATCH = 500


async def plan(redis: Redis, token: str, steps: Sequence[PlanStep]) -> bool:
    """Bring schedules up to date, see lua/plan.lua. False when another scheduler leads."""
    return bool(await script("plan")(redis, args=[token, pack(steps)]) == 1)


async def occur(redis: Redis, token: str, occurrences: Sequence[Occurrence]) -> list[int] | None:
    """Submit occurrences of schedules.

    Returns:
        What became of each, see lua/occur.lua; None when another scheduler leads.
    """
    replies: list[int] = await script("occur")(redis, args=[token, pack(occurrences)])
    return None if replies == [-1] else replies


async def run_now(redis: Redis, schedule: str, stream: str, task_id: str, data: bytes) -> str | None:
    """Submit a schedule's task at once. Returns the id of the earlier one that still waits, if there is one."""
    waiting: bytes = await script("run_now")(redis, args=[schedule, stream, task_id, data])
    return waiting.decode() or None


async def pause(redis: Redis, schedules: Sequence[str], paused: bool) -> list[bool]:
    """Pause schedules, or let them go on. Returns for which that is news."""
    news: list[bool] = []
    for part in in_calls(schedules, PAUSE_BATCH, lambda _: 0):
        news += [reply == 1 for reply in await script("pause")(redis, args=[int(paused), pack(part)])]
    return news


# --- the lead -----------------------------------------------------------------------------------------------


def _lead(token: str, lease_ms: int) -> list[LockSpec]:
    """Ours, and that of version 0.7: one scheduler leads, of whichever."""
    locks = (keys.LEADER, keys.PUBLISHED_LEADER)
    return [{"kind": "mutex", "key": key, "owner": token, "ttl_ms": lease_ms} for key in locks]


async def take_lead(redis: Redis, token: str, lease_ms: int) -> bool:
    """Take the lead if it is free, or held with this token. True when it was granted."""
    lead = _lead(token, lease_ms)
    return bool(await acquire(redis, lead)) or all(await extend(redis, lead))


async def renew_lead(redis: Redis, token: str, lease_ms: int) -> bool:
    """Renew the lead. False when it is lost."""
    return all(await extend(redis, _lead(token, lease_ms)))


async def release_lead(redis: Redis, token: str, lease_ms: int) -> None:
    """Give the lead back, and tell those who stand by. Nothing happens when it is not held with this token."""
    if await release(redis, _lead(token, lease_ms)):
        await redis.execute_command("PUBLISH", keys.LEADER, "free")


async def lead_left_ms(redis: Redis) -> int:
    """For how long one leads, if the lease is not renewed; below zero when nobody does."""
    left_ms: int = await redis.execute_command("PTTL", keys.LEADER)
    if left_ms < 0:  # 0.7 says nothing when it leads no more
        left_ms = min(_LOOK_MS, await redis.execute_command("PTTL", keys.PUBLISHED_LEADER))
    return left_ms


async def has_leader(redis: Redis) -> bool:
    """True if a scheduler leads."""
    return bool(await redis.execute_command("EXISTS", keys.LEADER))


# --- what is stored -----------------------------------------------------------------------------------------


async def _fields(redis: Redis, key: str) -> AsyncIterator[tuple[bytes, bytes]]:
    async for name, value in redis.hscan_iter(key, count=SCANNED):
        yield name, value


async def paused_schedules(redis: Redis) -> list[str]:
    """Ids of the schedules that are paused."""
    return [text_of(name) for name in await redis.execute_command("HKEYS", keys.PAUSED)]


async def fingerprints(redis: Redis) -> dict[bytes, bytes]:
    """Schedule -> fingerprint of the rule its next run was computed from."""
    return {name: value async for name, value in _fields(redis, keys.FINGERPRINTS)}


async def next_runs(redis: Redis) -> dict[str, int]:
    """Due time of each schedule (ms)."""
    found = redis.zscan_iter(keys.NEXT_RUNS, count=SCANNED)
    return {text_of(schedule): ms_of(str(due)) async for schedule, due in found}


async def next_run(redis: Redis, schedule: str) -> int | None:
    """Due time of a schedule (ms); None when it has no next run."""
    stored = await redis.execute_command("ZSCORE", keys.NEXT_RUNS, schedule)
    return None if stored is None else ms_of(stored)


async def stored_schedules(redis: Redis) -> set[bytes]:
    """Ids of all schedules of which anything is stored, but for pauses."""
    stored: set[bytes] = {name async for name, _ in redis.zscan_iter(keys.NEXT_RUNS, count=SCANNED)}
    for key in (keys.FINGERPRINTS, keys.LAST_RUNS, keys.OUTCOMES, keys.PROBLEMS):
        stored |= {name async for name, _ in _fields(redis, key)}
    return stored


async def schedule_problems(redis: Redis) -> dict[str, str]:
    """Schedule -> why the leader cannot submit it."""
    found: Any = await redis.execute_command("HGETALL", keys.PROBLEMS)
    pairs = found.items() if isinstance(found, Mapping) else zip(found[::2], found[1::2], strict=True)
    return {text_of(schedule): text_of(problem) for schedule, problem in pairs}


async def publish_problems(redis: Redis, problems: Mapping[str, str]) -> None:
    """Replace what is told of schedules that cannot be submitted."""
    told = list(problems.items())
    async with redis.pipeline(transaction=False) as pipe:
        pipe.execute_command("UNLINK", keys.PROBLEMS)
        for first in range(0, len(told), _PROBLEMS_BATCH):
            pipe.execute_command(
                "HSET", keys.PROBLEMS, *chain.from_iterable(told[first : first + _PROBLEMS_BATCH])
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
    """In the hands of a worker."""


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
    """Time when it is tried again; None when it has ended permanently."""


@dataclass(frozen=True)
class StoredSchedules:
    next_runs: Mapping[str, int]
    fingerprints: Mapping[str, str]
    last_runs: Mapping[str, tuple[str, str, str, int]]
    outcomes: Mapping[str, Outcome]
    paused: Mapping[str, int]
    problems: Mapping[str, str]


async def read_schedules(redis: Redis) -> StoredSchedules:
    """Key by key and part by part: however many schedules there are, no call takes long."""
    hashes = (keys.FINGERPRINTS, keys.LAST_RUNS, keys.OUTCOMES, keys.PAUSED, keys.PROBLEMS)
    known, last_runs, outcomes, paused, problems = [
        {text_of(name): text_of(value) async for name, value in redis.hscan_iter(key, count=SCANNED)}
        for key in hashes
    ]
    # After the fingerprints: what is planned meanwhile must not look as if it had no run left.
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
    ended_ms, _, told = text.partition(" ")
    fields: dict[str, Any] = json.loads(told)
    ended, retry_seconds = moment_of(int(ended_ms) / 1000), fields.get("retry_seconds")
    retry_at = None if retry_seconds is None else ended + timedelta(seconds=retry_seconds)
    known = {name: value for name, value in fields.items() if name in Outcome.__dataclass_fields__}
    return Outcome(ended=ended, **known, retry_at=retry_at)


async def activities(redis: Redis, stored: StoredSchedules) -> dict[str, Activity]:
    """States of those occurrences that have not ended."""
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
        reason = text_of(delayed).split(" ", 2)[1]
        return Activity.RETRYING if reason == "retry" else Activity.WAITING
    # A stream without a group has no pending entries. An entry that is gone has been granted the lock it
    # waited for, and is under another id with a worker, or will be in a moment.
    in_stream = bool(entry) and not isinstance(entry, Exception)
    return Activity.WAITING if in_stream and (isinstance(pending, Exception) or not pending) else Activity.RUNNING
