"""Read models of task statistics and failed attempts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from itertools import accumulate, pairwise

import msgpack
from redis.asyncio import Redis

from ..plumbing.broker import inspection
from ..plumbing.broker.inspection import server_time
from ..plumbing.broker.stored import moment_of, number_of, reading, text_of, typed
from ..plumbing.broker.telemetry import BUCKETS, end_of_bucket
from ..plumbing.messages.codec import loads
from ..plumbing.task_names import resolve_task_name
from .cursors import check_stream_cursor
from .models import Distribution, Failure, Page, Point, TaskStats, Window

#: Period, length of a bucket (s), number of full buckets before the current one.
_WINDOWS: dict[str, tuple[str, int, int]] = {
    "hour": ("minute", 60, 60),
    "day": ("hour", 3600, 24),
}
_FAILURES_READ = 100
#: Counters of more cannot have been counted.
_MOST = 1e15


async def stats(redis: Redis, window: Window = "hour") -> list[TaskStats]:
    """Return statistics of each task class over the last hour or day, by name."""
    totals: dict[str, dict[str, float]] = {}
    for bucket in (await _buckets(redis, window)).values():
        for name, counters in bucket.items():
            total = totals.setdefault(name, {})
            for counter, number in counters.items():
                total[counter] = total.get(counter, 0) + number
    return [_stats(name, totals[name]) for name in sorted(totals)]


async def _buckets(redis: Redis, window: str) -> dict[int, dict[str, dict[str, float]]]:
    """Return bucket number -> task -> counter -> value."""
    if window not in _WINDOWS:
        raise ValueError(f"no window {window!r}; the windows are {' and '.join(_WINDOWS)}")
    period, seconds, number = _WINDOWS[window]
    present = int(await server_time(redis)) // seconds
    buckets = list(range(present - number, present + 1))
    replies = await inspection.counters(redis, period, buckets)
    found = {}
    for bucket, reply in zip(buckets, replies, strict=True):
        with reading(inspection.counter_key(period, bucket)):
            found[bucket] = {text_of(name): _counters(packed) for name, packed in reply.items()}
    return found


def _counters(packed: bytes) -> dict[str, float]:
    found = {str(counter): float(number) for counter, number in msgpack.unpackb(packed).items()}
    if not all(0 <= number < _MOST for number in found.values()):  # also for NaN
        raise ValueError("no counters")
    return found


def _stats(name: str, counters: Mapping[str, float]) -> TaskStats:
    done, failed = int(counters.get("done", 0)), int(counters.get("failed", 0))
    attempts = done + failed
    return TaskStats(
        task_name=name,
        done=done,
        failed=failed,
        retried=int(counters.get("retried", 0)),
        dead=int(counters.get("dead", 0)),
        failure_rate=failed / attempts if attempts else None,
        run=_distribution(counters, "r", "run"),
        queue=_distribution(counters, "q", "queue"),
    )


def _distribution(counters: Mapping[str, float], prefix: str, total: str) -> Distribution:
    up_to = list(accumulate(int(counters.get(f"{prefix}{bucket}", 0)) for bucket in range(BUCKETS)))
    count = up_to[-1]
    p50, p95, p99 = (
        end_of_bucket(bisect_left(up_to, share * count)) if count else None for share in (0.5, 0.95, 0.99)
    )
    return Distribution(
        count=count,
        mean_seconds=counters.get(total, 0.0) / count if count else None,  # counters of 0 are not stored
        p50_seconds=p50,
        p95_seconds=p95,
        p99_seconds=p99,
    )


async def history(redis: Redis) -> list[Point]:
    """Return counters of the past hour by minute, oldest first."""
    ended = await _buckets(redis, "hour")
    minutes = list(ended)
    replies = await inspection.throughput(redis, minutes)
    flows = [{text_of(name): number_of(value) for name, value in reply.items()} for reply in replies]
    noted = [(position, _sum(flow, " added")) for position, flow in enumerate(flows) if "at" in flow]
    submitted: dict[int, int] = {}
    for (first, before), (last, after) in pairwise(noted):  # in quiet times, every third minute is noted
        shares = [max(0, after - before) * part // (last - first) for part in range(last - first + 1)]
        submitted |= {first + part: end - begin for part, (begin, end) in enumerate(pairwise(shares))}
    return [
        Point(
            at=moment_of(60 * minute),
            submitted=submitted.get(position),
            done=int(sum(counters.get("done", 0) for counters in ended[minute].values())),
            failed=int(sum(counters.get("failed", 0) for counters in ended[minute].values())),
            backlog=_sum(flow, " length") if "at" in flow else None,
        )
        for position, (minute, flow) in enumerate(zip(minutes, flows, strict=True))
    ]


def _sum(flow: Mapping[str, int], suffix: str) -> int:
    return sum(value for name, value in flow.items() if name.endswith(suffix))


async def failed_task_names(redis: Redis) -> list[str]:
    """Return the registry names of tasks with stored failures."""
    names: set[str] = set()
    begin = "+"
    while True:
        entries = await inspection.failed_attempts(redis, begin, _FAILURES_READ)
        with reading(inspection.FAILURES):
            names.update(str(loads(fields[b"data"])["task_name"]) for _, fields in entries)
        if len(entries) < _FAILURES_READ:
            return sorted(names)
        begin = f"({text_of(entries[-1][0])}"


async def failures(
    redis: Redis, limit: int = 100, after: str | None = None, *, task_name: str | None = None
) -> Page[Failure]:
    """Return failed attempts, newest first. About 500 are kept, for a week.

    Args:
        task_name: only of this task: `category:ClassName`, or the class name alone.
    """
    if task_name is not None and ":" not in task_name:
        task_name = resolve_task_name(task_name, await failed_task_names(redis)) or task_name
    found: list[Failure] = []
    begin = "+" if after is None else f"({check_stream_cursor(after)}"
    while len(found) <= limit:
        entries = await inspection.failed_attempts(redis, begin, _FAILURES_READ)
        for entry, fields in entries:
            with reading(inspection.FAILURES):
                failure = loads(fields[b"data"])
                if task_name is None or failure["task_name"] == task_name:
                    found.append(typed(Failure, {**failure, "id": text_of(entry), "at": moment_of(failure["at"])}))
            begin = f"({text_of(entry)}"
        if len(entries) < _FAILURES_READ:
            break
    return Page(items=found[:limit], after=found[limit - 1].id if len(found) > limit else None)
