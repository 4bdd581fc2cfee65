"""Purges queues and releases locks."""

from __future__ import annotations

from collections.abc import Sequence

from redis.asyncio import Redis

from ..plumbing.broker import inspection, locking
from ..plumbing.broker.cancel import cancel_waiting
from ..plumbing.broker.requests import LockSpec
from .cursors import PAGE, entry_parts, read_head, streams_of_queue, waiting_heads
from .locks import lock
from .models import Lock, Released


async def purge(redis: Redis, queue: str) -> int:
    """Cancel all tasks that wait in a queue (`{priority}:{size}`). Returns how many.

    Running tasks go on, and so do those that come in meanwhile. The groups of the tasks, and those that wait for
    their results, are informed that they were cancelled.

    Raises:
        ValueError: when there is no such queue.
    """
    number = 0
    for stream in streams_of_queue(queue):
        newest = await inspection.last_entry(redis, stream)
        if newest is None:
            continue
        last, after = entry_parts(newest), None
        while entries := [
            (entry, await _without_arguments(redis, stream, entry, fields.get(b"data", b""), length))
            for entry, fields, length in await waiting_heads(redis, stream, after, PAGE)
            if entry_parts(entry) <= last
        ]:
            number += await cancel_waiting(redis, stream, entries)
            after = entries[-1][0]
    return number


async def _without_arguments(redis: Redis, stream: str, entry: str, data: bytes, length: int) -> bytes:
    """A message, of which a large one is needed only as far as its labels go."""
    head = read_head(data, length)
    if head.message is None or head.whole:
        return data
    if head.labels_known:
        return head.message.dumpb()
    return await inspection.entry_data(redis, stream, entry) or data


async def release_lock(redis: Redis, key: str, owners: Sequence[str] | None = None) -> Released:
    """Release a lock of its holders, and grant it to the next waiter.

    A task that loses its lock is cancelled when its worker next renews it, a third of a lease later at most, and
    counts as failed. The spent quota of a rate limiter comes back; tasks that wait for it come at their time.

    Args:
        owners: only of these (`Holder.owner`); None: of all that hold it now.

    Raises:
        ValueError: when the key is not that of a lock.
    """
    found = await lock(redis, key)
    if found is None:
        return Released(key=key, released=0)
    if found.kind == "rate":
        return Released(key=key, released=found.held if await locking.reset_rate(redis, key) else 0)
    hit = [holder for holder in found.holders if owners is None or holder.owner in owners]
    released = await locking.release(redis, [_spec(found, holder.owner) for holder in hit]) if hit else 0
    return Released(key=key, released=released, hit=hit)


def _spec(found: Lock, owner: str) -> LockSpec:
    spec: LockSpec = {"kind": found.kind, "key": found.key, "owner": owner}
    if found.limit is not None:
        spec["limit"] = found.limit
    return spec
