"""Take, renew and give back locks; see who holds them and how many tasks wait for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgpack

from ..enums import Size
from . import keys
from .scripts import pack, script
from .sizes import in_calls
from .stored import SCANNED, text_of

if TYPE_CHECKING:
    from redis import Redis as SyncRedis
    from redis.asyncio import Redis

    from .requests import LockSpec

#: Locks that one script call gives back, or renews: 1 ms of the server's time.
RELEASE_BATCH = 200


async def acquire(redis: Redis, locks: Sequence[LockSpec]) -> int | None:
    """Take all the locks, or none of them. Returns their fencing token, or None."""
    granted, token, *_ = await script("acquire")(redis, args=[pack(locks)])
    return int(token) if granted == 1 else None


async def release(redis: Redis, locks: Sequence[LockSpec]) -> int:
    """Give the locks back, some in each call, and wake who waits for them. Returns how many were still held."""
    held = 0
    for part in in_calls(locks, RELEASE_BATCH, lambda _: 0):
        held += int(await script("release")(redis, args=[pack(part)]))
    return held


async def extend(redis: Redis, locks: Sequence[LockSpec]) -> list[bool]:
    """Renew the locks to their full time to live. Returns which of them are still ours."""
    kept: list[bool] = []
    for part in in_calls(locks, RELEASE_BATCH, lambda _: 0):
        kept += [reply == 1 for reply in await script("extend")(redis, args=[pack(part)])]
    return kept


def extend_now(redis: SyncRedis, locks: Sequence[LockSpec]) -> None:
    """`extend` on a blocking connection, for a thread."""
    script("extend").run(redis, args=[pack(locks)])


async def reset_rate(redis: Redis, key: str) -> bool:
    """Give all spent quota of a rate limiter back. False: none was spent."""
    return bool(await redis.unlink(key))


def can_be_packed(value: Any) -> bool:
    """True if a value, as a lock of the user's own kind, can be sent to the server."""
    try:
        pack(value)
    except Exception:
        return False
    return True


async def inspect(redis: Redis, locks: Sequence[Mapping[str, Any]], at_most: int) -> list[list[Any]]:
    """Holders of locks, and the number of waiting tasks. See lua/inspect.lua."""
    packed = await script("inspect")(redis, args=[pack(locks), at_most])
    found: list[list[Any]] = msgpack.unpackb(packed, unicode_errors="replace", strict_map_key=False)
    return found


async def reported_locks(redis: Redis) -> list[str]:
    """Limiters, and locks that have refused a task, as workers reported them: "{…} {limit} {window} {key}"."""
    return [text_of(member) for member in await redis.zrange(keys.LOCKS_SEEN, 0, -1)]


async def held_locks_records(redis: Redis, workers: Sequence[str]) -> dict[str, dict[str, str]]:
    """The held-locks record of each worker: "{owner}:{key}" -> lock."""
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
    return [sum(counts[at : at + sizes]) for at in range(0, len(counts), sizes)]
