"""Read models of locks and limiters (holders, waiters, used quota), and their release."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from redis.asyncio import Redis

from ..plumbing.broker import locking
from ..plumbing.broker.inspection import server_time
from ..plumbing.broker.requests import LockKind, LockSpec
from ..plumbing.broker.stored import moment_of, number_of
from .models import Holder, Lock, Page, Released
from .processes import alive_workers, reported_running

#: Maximum number of listed holders of a lock.
HOLDERS_SHOWN = 100


async def locks(redis: Redis, limit: int = 100, after: str | None = None) -> Page[Lock]:
    """Return the locks that tasks hold or wait for, and limiters that were used within the last day, by key.

    A lock that is held outside the task system is listed while a task waits for it; `lock` finds it by key.
    """
    reported = await _reported(redis)
    owners = await _owners(redis)
    known = sorted({*reported, *(key for _, key in owners)})
    keys = [key for key in known if after is None or key > after]
    found: list[Lock] = []
    while keys and len(found) < limit:
        part, keys = keys[:limit], keys[limit:]
        inspected = await _inspect(redis, part, reported, owners)
        found += [shown for shown in inspected if shown.held or shown.waiters]
    more = len(found) > limit or bool(keys)
    found = found[:limit]
    return Page(items=found, after=found[-1].key if more and found else None)


async def lock(redis: Redis, key: str) -> Lock | None:
    """Return one lock by its Redis key; None if it has neither holders nor waiters."""
    if locking.kind_of(key) is None:
        raise ValueError(f"{key!r} is not the key of a lock: these begin with {', '.join(locking.PREFIXES)}")
    [found] = await _inspect(redis, [key], await _reported(redis), await _owners(redis))
    return found if found.held or found.waiters else None


async def _reported(redis: Redis) -> dict[str, tuple[int | None, int | None]]:
    """Return limit and window (µs) of the locks that workers reported last, by key."""
    found: dict[str, tuple[int | None, int | None]] = {}
    for member in await locking.reported_locks(redis):
        parts = member.split(" ", 3)
        if len(parts) == 4 and locking.kind_of(parts[3]) is not None:
            found[parts[3]] = (number_of(parts[1]) or None, number_of(parts[2]) or None)
    return found


async def _owners(redis: Redis) -> dict[tuple[str, str], tuple[str, int | None]]:
    """Return the owners of the locks that tasks hold: owner and key -> worker and limit."""
    found: dict[tuple[str, str], tuple[str, int | None]] = {}
    for name, record in (await locking.held_locks_records(redis, await alive_workers(redis))).items():
        for field, held in record.items():
            owner, _, key = field.partition(":")
            _, _, limit = held.partition(" ")
            if owner != "entry" and locking.kind_of(key) is not None:
                found[owner, key] = (name, number_of(limit) or None)
    return found


async def _inspect(
    redis: Redis,
    keys: Sequence[str],
    reported: Mapping[str, tuple[int | None, int | None]],
    owners: Mapping[tuple[str, str], tuple[str, int | None]],
) -> list[Lock]:
    windows = {key: {"window_us": window_us} for key, (_, window_us) in reported.items() if window_us is not None}
    queries = [{"key": key, "kind": locking.kind_of(key), **windows.get(key, {})} for key in keys]
    replies = await locking.inspect(redis, queries, HOLDERS_SHOWN)
    now = await server_time(redis)
    named = {reply_owner for reply in replies for reply_owner in reply[4][::2]}
    tasks = await _tasks_of(redis, {worker for (owner, _), (worker, _) in owners.items() if owner in named})
    limits = {key: known for (_, key), (_, known) in owners.items() if known is not None}
    found = []
    for key, (held, waiters, left_ms, kind, pairs) in zip(keys, replies, strict=True):
        limit, window_us = reported.get(key, (None, None))
        limit = limits.get(key) if limit is None else limit
        holders = []
        for owner, until_us in zip(pairs[::2], pairs[1::2], strict=True):
            worker, _ = owners.get((owner, key), (None, None))
            task_id, task_name = tasks.get((owner, key), (None, None))
            until = moment_of(int(until_us) / 1e6) if int(until_us) else None
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
                expires=moment_of(now + left_ms / 1000) if held and left_ms >= 0 else None,
            )
        )
    return found


async def _tasks_of(redis: Redis, workers: set[str]) -> dict[tuple[str, str], tuple[str, str]]:
    """Return owner and key -> id and name of the task, if its worker has reported it."""
    if not workers:
        return {}
    return {
        (owner, key): (task.task_id, task.task_name)
        for tasks in (await reported_running(redis, sorted(workers))).values()
        for task in tasks
        for key, owner in task.locks
    }


async def release_lock(redis: Redis, key: str, owners: Sequence[str] | None = None) -> Released:
    """Take a lock from its holders and grant it to the next waiter.

    A task that loses its lock is cancelled at the next renewal of its worker, within a third of a lease, and
    counts as failed. The used quota of a rate limiter is reset; tasks that wait for it start at their due time.

    Args:
        owners: only these holders (`Holder.owner`); None: all.
    """
    found = await lock(redis, key)
    if found is None:
        return Released(key=key, released=0)
    if found.is_quota:
        return Released(key=key, released=found.held if await locking.reset_rate(redis, key) else 0)
    hit = [holder for holder in found.holders if owners is None or holder.owner in owners]
    released = await locking.release(redis, [_spec(found, holder.owner) for holder in hit]) if hit else 0
    return Released(key=key, released=released, hit=hit)


def _spec(found: Lock, owner: str) -> LockSpec:
    spec: LockSpec = {"kind": found.kind, "key": found.key, "owner": owner}
    if found.limit is not None:
        spec["limit"] = found.limit
    return spec
