"""Locks and limiters: holders, waiters, spent quota."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from redis.asyncio import Redis

from ..plumbing.broker import locking
from ..plumbing.broker.inspection import server_time
from .cursors import moment
from .models import Holder, Lock, LockKind, Page
from .processes import alive_workers, reported_running

#: Holders that are named.
HOLDERS_SHOWN = 100
#: Prefix of the Redis key -> the lock as lua/inspect.lua knows it.
_KINDS = {"lock:mutex:": "mutex", "lock:rw:": "rw", "limiter:conc:": "concurrency", "limiter:rate:": "rate"}


async def locks(redis: Redis, limit: int = 100, after: str | None = None) -> Page[Lock]:
    """Locks that tasks hold or wait for, and limiters that were used within the last day, by key.

    A lock that is held outside the task system is among them while a task waits for it; `lock` finds it by name.
    """
    seen = await _seen(redis)
    owners = await _owners(redis)
    known = sorted({*seen, *(key for _, key in owners)})
    wanted = [key for key in known if after is None or key > after]
    found: list[Lock] = []
    while wanted and len(found) < limit:
        part, wanted = wanted[:limit], wanted[limit:]
        inspected = await _inspect(redis, part, seen, owners)
        found += [shown for shown in inspected if shown.held or shown.waiters]
    more = len(found) > limit or bool(wanted)
    found = found[:limit]
    return Page(items=found, after=found[-1].key if more and found else None)


async def lock(redis: Redis, key: str) -> Lock | None:
    """Return one lock by its Redis key; None when it has neither holders nor waiters.

    Raises:
        ValueError: when the key is not that of a lock.
    """
    if _kind(key) is None:
        raise ValueError(f"{key!r} is not the key of a lock: it would begin with {', '.join(_KINDS)}")
    [found] = await _inspect(redis, [key], await _seen(redis), await _owners(redis))
    return found if found.held or found.waiters else None


def _kind(key: str) -> str | None:
    return next((kind for prefix, kind in _KINDS.items() if key.startswith(prefix)), None)


async def _seen(redis: Redis) -> dict[str, tuple[int | None, int | None]]:
    """Return limit and window (µs) of the locks that workers reported, by key; the newest report counts."""
    found: dict[str, tuple[int | None, int | None]] = {}
    for member in await locking.reported_locks(redis):
        parts = member.split(" ", 3)
        if len(parts) == 4 and _kind(parts[3]) is not None:
            found[parts[3]] = (int(parts[1]) if parts[1] else None, int(parts[2]) if parts[2] else None)
    return found


async def _owners(redis: Redis) -> dict[tuple[str, str], tuple[str, int | None]]:
    """Owners of the locks that tasks hold: owner and key -> worker and limit."""
    found: dict[tuple[str, str], tuple[str, int | None]] = {}
    for name, record in (await locking.held_locks_records(redis, await alive_workers(redis))).items():
        for field, held in record.items():
            owner, _, key = field.partition(":")
            _, _, limit = held.partition(" ")
            if owner != "entry" and _kind(key) is not None:
                found[owner, key] = (name, int(limit) if limit.isdigit() else None)
    return found


async def _inspect(
    redis: Redis,
    wanted: Sequence[str],
    seen: Mapping[str, tuple[int | None, int | None]],
    owners: Mapping[tuple[str, str], tuple[str, int | None]],
) -> list[Lock]:
    asked = [{"key": key, "kind": _kind(key), "window_us": seen.get(key, (None, None))[1]} for key in wanted]
    asked = [{name: value for name, value in one.items() if value is not None} for one in asked]
    replies = await locking.inspect(redis, asked, HOLDERS_SHOWN)
    now = await server_time(redis)
    named = {reply_owner for reply in replies for reply_owner in reply[4][::2]}
    tasks = await _tasks_of(redis, {worker for (owner, _), (worker, _) in owners.items() if owner in named})
    limits = {key: known for (_, key), (_, known) in owners.items() if known is not None}
    found = []
    for key, (held, waiters, left_ms, kind, pairs) in zip(wanted, replies, strict=True):
        limit, window_us = seen.get(key, (None, None))
        limit = limits.get(key) if limit is None else limit
        holders = []
        for owner, until_us in zip(pairs[::2], pairs[1::2], strict=True):
            worker, _ = owners.get((owner, key), (None, None))
            task_id, task_name = tasks.get((owner, key), (None, None))
            until = moment(int(until_us) / 1e6) if int(until_us) else None
            holders.append(Holder(owner=owner, until=until, worker=worker, task_id=task_id, task_name=task_name))
        found.append(
            Lock(
                key=key,
                kind=cast("LockKind", kind),
                held=held,
                waiters=waiters,
                holders=holders,
                limit=limit,
                window_seconds=None if window_us is None else window_us / 1e6,
                expires=moment(now + left_ms / 1000) if held and left_ms >= 0 else None,
            )
        )
    return found


async def _tasks_of(redis: Redis, workers: set[str]) -> dict[tuple[str, str], tuple[str, str]]:
    """Owner and key -> id and name of the task, as far as the workers have reported it."""
    if not workers:
        return {}
    return {
        (owner, key): (task["task_id"], task["task_name"])
        for tasks in (await reported_running(redis, sorted(workers))).values()
        for task in tasks
        for key, owner in task["locks"]
    }
