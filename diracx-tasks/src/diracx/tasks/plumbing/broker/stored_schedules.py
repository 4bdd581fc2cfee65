"""Reads what is stored of schedules: next and last runs, outcomes, pauses, problems, and open occurrences."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from . import keys
from .stored import SCANNED, ms_of, reading

if TYPE_CHECKING:
    from redis.asyncio import Redis


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


def _moment(ms: int) -> datetime:
    return datetime.fromtimestamp(ms / 1000, UTC)


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
    return StoredSchedules(next_runs, fingerprints, last, ended, since, problems)


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


async def activities(redis: Redis, stored: StoredSchedules) -> dict[str, Activity]:
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
