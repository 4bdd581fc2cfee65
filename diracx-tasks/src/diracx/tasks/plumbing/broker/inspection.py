"""Reads the state of the whole system for operators: numbers, heads of messages, counters, failures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgpack

from . import keys
from .scripts import QUEUES, pack, script
from .sizes import CALL_BYTES
from .stored import number_of, text_of

if TYPE_CHECKING:
    from redis.asyncio import Redis

#: Name of the stream of failures, for error messages.
FAILURES = keys.FAILURES


async def snapshot(redis: Redis) -> dict[str, Any]:
    """Read the numbers of tasks, workers, locks and schedules in one call. See lua/snapshot.lua."""
    found: dict[str, Any] = msgpack.unpackb(
        await script("snapshot")(redis, args=[QUEUES]), unicode_errors="replace"
    )
    return found


async def note_alerts(redis: Redis, checks: Sequence[str], alerts: Sequence[str]) -> list[int]:
    """Store the alerts of health checks; return the time when each was first noticed (ms). See lua/alerts.lua."""
    return [int(since) for since in await script("alerts")(redis, args=[pack(checks), pack(alerts)])]


async def stream_heads(
    redis: Redis, ranges: Sequence[tuple[str, str, str, int]], at_most: int
) -> list[list[tuple[str, dict[bytes, bytes], int]]]:
    """Entries of ranges of streams: id, fields truncated to `at_most` bytes, and their length in bytes.

    Args:
        ranges: stream, first and last entry as for XRANGE, and the limit of entries of each.
    """
    heads: list[list[tuple[str, dict[bytes, bytes], int]]] = [[] for _ in ranges]
    current, more = 0, 1
    while more:
        unread = list(ranges[current:])
        if heads[current:] and heads[current]:
            stream, _, last, count = unread[0]
            unread[0] = (stream, f"({heads[current][-1][0]}", last, count - len(heads[current]))
        found, _, more = await script("heads")(redis, args=[at_most, pack(unread), pack([]), CALL_BYTES])
        for position, part in enumerate(found, start=current):
            heads[position] += [
                (entry.decode(), dict(zip(fields[::2], fields[1::2], strict=True)), length)
                for entry, fields, length in part
            ]
        current += max(0, len(found) - 1)
    return heads


async def delayed_heads(redis: Redis, tasks: Sequence[str], at_most: int) -> list[tuple[bytes, int] | None]:
    """Messages of delayed tasks, truncated to `at_most` bytes, and their length; None: no longer delayed."""
    heads: list[tuple[bytes, int] | None] = []
    while len(heads) < len(tasks):
        unread = pack(tasks[len(heads) :])
        _, found, _ = await script("heads")(redis, args=[at_most, pack([]), unread, CALL_BYTES])
        heads += [None if each is None else (each[0], each[1]) for each in found]
    return heads


async def server_time(redis: Redis) -> float:
    """Time of the server's clock, in seconds since 1970."""
    seconds, microseconds = await redis.execute_command("TIME")
    return int(seconds) + int(microseconds) / 1e6


async def delayed_page(redis: Redis, begin: str, offset: int, count: int) -> list[tuple[float, str]]:
    """Due times (ms) and ids of delayed tasks, in this order, from a due time on."""
    found: Any = await redis.zrangebyscore(keys.DELAYED, begin, "+inf", offset, count, withscores=True)
    return [(score, text_of(task)) for task, score in found]


async def delayed_number(redis: Redis, reason: str) -> int:
    """Number of tasks that are delayed for a reason."""
    return number_of(await redis.execute_command("HGET", keys.DELAYED_REASONS, reason))


async def delayed_offset(redis: Redis, due_ms: float, task: str) -> int:
    """Number of delayed tasks with this due time up to this id, whether that task is delayed or not."""
    begin = repr(due_ms)
    first, end = 0, await redis.zcount(keys.DELAYED, begin, begin)
    while first < end:
        middle = (first + end) // 2
        found = await delayed_page(redis, begin, middle, 1)
        if found and found[0] <= (due_ms, task):
            first = middle + 1
        else:
            end = middle
    return first


async def line_times(redis: Redis, locks: Sequence[str]) -> dict[str, Any]:
    """Time of the next poll of each lock's waiting tasks (ms); None: none is planned."""
    return dict(zip(locks, await redis.execute_command("ZMSCORE", keys.LINES, *locks), strict=True))


async def last_entry(redis: Redis, stream: str) -> str | None:
    """Id of the last entry of a stream; None: it is empty."""
    found: Any = await redis.xrevrange(stream, count=1)
    return text_of(found[0][0]) if found else None


async def entry_data(redis: Redis, stream: str, entry: str) -> bytes | None:
    """Message of an entry; None: the entry does not exist, or has no message."""
    found: Any = await redis.xrange(stream, entry, entry)
    return found[0][1].get(b"data") if found else None


async def last_delivered(redis: Redis, stream: str) -> str | None:
    """Id of the last entry of a stream that was delivered to a worker; None: there is no such stream."""
    try:
        found: Any = await redis.xinfo_groups(stream)
    except Exception as error:
        if "no such key" in str(error):
            return None
        raise
    groups = [group for group in found if text_of(group["name"]) == keys.GROUP]
    return text_of(groups[-1]["last-delivered-id"]) if groups else "0-0"


def counter_key(period: str, bucket: int) -> str:
    """Key of the counters of a minute or an hour.

    Args:
        period: `minute` or `hour`.
        bucket: number of the period since 1970.
    """
    return f"{keys.MINUTE_PREFIX if period == 'minute' else keys.HOUR_PREFIX}{bucket}"


async def counters(redis: Redis, period: str, buckets: Sequence[int]) -> list[dict[bytes, bytes]]:
    """Counters of the executions that ended in each period: task -> counters (msgpack)."""
    return await _hashes(redis, [counter_key(period, bucket) for bucket in buckets])


async def throughput(redis: Redis, minutes: Sequence[int]) -> list[dict[bytes, bytes]]:
    """Throughput of each queue in these minutes: submitted and ended tasks."""
    return await _hashes(redis, [f"{keys.THROUGHPUT_PREFIX}{minute}" for minute in minutes])


async def _hashes(redis: Redis, names: Iterable[str]) -> list[dict[bytes, bytes]]:
    async with redis.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.hgetall(name)
        replies: list[dict[bytes, bytes]] = await pipe.execute()
    return replies


async def failed_attempts(redis: Redis, newest: str, count: int) -> Any:
    """Entries of the stream of failures, newest first."""
    return await redis.xrevrange(keys.FAILURES, max=newest, count=count)


async def unfinished(redis: Redis) -> dict[str, int]:
    """Number of unfinished tasks per stream or key, without those delayed to a later time; one atomic read."""
    now_ms = int(await server_time(redis) * 1000)
    async with redis.pipeline(transaction=True) as pipe:
        for stream in keys.EVERY_STREAM:
            pipe.xlen(stream)
        pipe.zcount(keys.DELAYED, "-inf", now_ms)
        pipe.llen(keys.GROUP_OUTBOX)
        pipe.hvals(keys.DELAYED_DATA)
        *lengths, due, staged, delayed = await pipe.execute()
    # Tasks that wait for a lock or limiter count, whatever their due time is.
    reasons = [header.split(b"\n", 1)[0].split(b" ")[1] for header in delayed]
    numbers = {
        **dict(zip(keys.EVERY_STREAM, lengths, strict=True)),
        keys.DELAYED: due,
        keys.GROUP_OUTBOX: staged,
        "waiting for locks": sum(reason in {b"lock", b"rate"} for reason in reasons),
    }
    return {place: number for place, number in numbers.items() if number}
