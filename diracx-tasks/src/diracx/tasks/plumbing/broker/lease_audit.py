"""Finds consumers that are missing on the lists of workers, as after a loss of data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from redis.exceptions import ResponseError

from ..enums import Size
from . import keys, published
from .stored import SCANNED

if TYPE_CHECKING:
    from redis.asyncio import Redis

#: Interval of the search for consumers missing on the lists, in leases: only a loss of data causes some.
AUDIT_LEASES = 4
#: Shortest lease that is assumed for a worker when the length of its lease is unknown.
_UNKNOWN_LEASE_MS = 30_000


async def audit_leases(redis: Redis, auditor: str, lease_ms: int) -> None:
    """Enter missing consumers into the list of workers, so that they are reclaimed if they are dead.

    One worker does this for all. Each consumer gets its own lease, if that is known, else the longest known one.

    Args:
        auditor: name of the calling worker.
    """
    shortest: Any = await redis.zrange(keys.LEASES, 0, 0, withscores=True)
    kept_ms = (AUDIT_LEASES - 1) * min(lease_ms, *(length for _, length in shortest), math.inf)
    # Expires before the next audit of the worker with the shortest lease.
    if not await redis.set(keys.AUDITOR, auditor, nx=True, px=max(1, int(kept_ms))):
        return
    sizes = [keys.streams_of(size) for size in Size]  # a worker creates all streams of its size
    streams = [stream for size in sizes if await redis.exists(*size) for stream in size]
    async with redis.pipeline(transaction=False) as pipe:
        pipe.time()
        pipe.zrange(keys.LEASES, -1, -1, withscores=True)
        for stream in streams:
            pipe.xinfo_consumers(stream, keys.GROUP)
        (seconds, microseconds), longest, *found = await pipe.execute(raise_on_error=False)
        now_ms = seconds * 1000 + microseconds // 1000
        unknown_ms = max(_UNKNOWN_LEASE_MS, lease_ms, *(length for _, length in longest))
        # An error means that the stream or its consumer group does not exist.
        known = [consumers for consumers in found if not isinstance(consumers, ResponseError)]
        await published.track_workers(redis, known, now_ms)
        names = list({consumer["name"] for consumers in known for consumer in consumers})
        for first in range(0, len(names), SCANNED):
            batch = names[first : first + SCANNED]
            lengths = zip(batch, await redis.zmscore(keys.LEASES, batch), strict=True)
            ends_ms = {name: int(now_ms + (length or unknown_ms)) for name, length in lengths}
            await redis.zadd(keys.ALIVE, ends_ms, nx=True)
        # Remove workers that an earlier release declared dead, which does not delete them from this key.
        if removed := await redis.zdiff([keys.LEASES, keys.ALIVE]):
            await redis.zrem(keys.LEASES, *removed)
