"""Simulation of a worker that has been dead for several leases."""

from __future__ import annotations

from contextlib import suppress

from diracx.tasks.plumbing.broker import keys
from redis import Redis
from redis.exceptions import ResponseError

_LONG_MS = 10**7


def stays_silent(url: str, worker: str) -> None:
    """Make the server treat its leases as expired. The death must have been detected before."""
    with Redis.from_url(url) as redis:
        for stream in keys.EVERY_STREAM:
            with suppress(ResponseError):  # there is no such stream, or no worker has read it
                for each in redis.xpending_range(stream, keys.GROUP, "-", "+", 1000, worker):
                    entries = [each["message_id"]]
                    redis.xclaim(stream, keys.GROUP, worker, 0, entries, idle=_LONG_MS, justid=True)
