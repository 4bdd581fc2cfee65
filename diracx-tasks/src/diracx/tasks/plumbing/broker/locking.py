"""Takes, renews and releases locks; reads their holders and the number of waiting tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgpack

from ..enums import Size
from . import keys
from .requests import LOCK_KINDS
from .scripts import pack, script
from .sizes import in_calls
from .stored import SCANNED, text_of

if TYPE_CHECKING:
    from redis import Redis as SyncRedis
    from redis.asyncio import Redis

    from .requests import LockSpec

#: Locks that one script call releases or renews: 1 ms of the server's time.
RELEASE_BATCH = 200
#: Beginnings of the keys of all locks.
PREFIXES = tuple(dict.fromkeys(f"{kind.prefix}:" for kind in LOCK_KINDS.values()))


def kind_of(key: str) -> str | None:
    """Kind of a lock by its key, the first of kinds that share their keys; None: it is not the key of a lock."""
    return next((name for name, kind in LOCK_KINDS.items() if key.startswith(f"{kind.prefix}:")), None)


async def acquire(redis: Redis, locks: Sequence[LockSpec]) -> int | None:
    """Take all the locks, or none of them. Returns their fencing token, or None."""
    granted, token, *_ = await script("acquire")(redis, args=[pack(locks)])
    return int(token) if granted == 1 else None


async def release(redis: Redis, locks: Sequence[LockSpec]) -> int:
    """Release the locks, in batches, and grant them to waiting tasks. Returns how many were still held."""
    held = 0
    for part in in_calls(locks, RELEASE_BATCH, lambda _: 0):
        held += int(await script("release")(redis, args=[pack(part)]))
    return held


async def extend(redis: Redis, locks: Sequence[LockSpec]) -> list[bool]:
    """Renew the locks to their full time to live. Returns for each whether its owner still holds it."""
    kept: list[bool] = []
    for part in in_calls(locks, RELEASE_BATCH, lambda _: 0):
        kept += [reply == 1 for reply in await script("extend")(redis, args=[pack(part)])]
    return kept


def extend_now(redis: SyncRedis, locks: Sequence[LockSpec]) -> None:
    """`extend` on a blocking connection, for a thread."""
    script("extend").run(redis, args=[pack(locks)])


async def reset_rate(redis: Redis, key: str) -> bool:
    """Reset the spent quota of a rate limiter. False: none was spent."""
    return bool(await redis.unlink(key))


def can_be_packed(value: Any) -> bool:
    """True if a value, such as a custom lock, can be encoded for a script."""
    try:
        pack(value)
    except Exception:
        return False
    return True


async def inspect(redis: Redis, locks: Sequence[Mapping[str, Any]], at_most: int) -> list[list[Any]]:
    """Read the holders of locks, and the number of waiting tasks. See lua/inspect.lua."""
    packed = await script("inspect")(redis, args=[pack(locks), at_most])
    found: list[list[Any]] = msgpack.unpackb(packed, unicode_errors="replace", strict_map_key=False)
    return found


async def reported_locks(redis: Redis) -> list[str]:
    """Limiters, and locks that have refused a task, as reported by workers: "{kind} {limit} {window} {key}"."""
    return [text_of(member) for member in await redis.zrange(keys.LOCKS_SEEN, 0, -1)]


async def held_locks_records(redis: Redis, workers: Sequence[str]) -> dict[str, dict[str, str]]:
    """Held-locks record of each worker: "{owner}:{key}" -> lock."""
    cursors = dict.fromkeys(workers, 0)
    found: dict[str, dict[str, str]] = {worker: {} for worker in workers}
    while cursors:
        async with redis.pipeline(transaction=False) as pipe:
            for name, cursor in cursors.items():
                pipe.hscan(keys.HELD_PREFIX + name, cursor, count=SCANNED)
            parts = dict(zip(cursors, await pipe.execute(), strict=True))
        for name, (_, fields) in parts.items():
            found[name] |= {text_of(field): text_of(value) for field, value in fields.items()}
        cursors = {name: cursor for name, (cursor, _) in parts.items() if cursor}
    return found


async def waiter_counts(redis: Redis, locks: Sequence[str]) -> list[int]:
    """Number of tasks that wait for each of these locks."""
    async with redis.pipeline(transaction=False) as pipe:
        for key in locks:
            for line in keys.of_all_sizes(keys.WAITING_PREFIX, key):
                pipe.zcard(line)
        counts: list[int] = await pipe.execute() if locks else []
    sizes = len(Size)
    return [sum(counts[first : first + sizes]) for first in range(0, len(counts), sizes)]
