"""Task statistics by class, minute and hour, and the failed attempts."""

from __future__ import annotations

from collections.abc import Mapping

import msgpack
from redis.asyncio import Redis

from ..plumbing._util.histogram import end_of_bucket
from ..plumbing.broker import inspection
from ..plumbing.broker.inspection import server_time
from ..plumbing.broker.stored import reading
from ..plumbing.messages.codec import loads
from ..plumbing.task_names import resolve_task_name
from .cursors import as_mapping, moment, place_in_stream, text
from .models import Distribution, Failure, Page, Point, TaskStats, Window

#: Period, length of a bucket (s), number of full buckets before the present one.
_WINDOWS: dict[str, tuple[str, int, int]] = {
    "hour": ("minute", 60, 60),
    "day": ("hour", 3600, 24),
}
_FAILURES_READ = 100


async def stats(redis: Redis, window: Window = "hour") -> list[TaskStats]:
    """Statistics of each class of tasks for the last hour (by the minute) or day (by the hour), by name.

    Raises:
        ValueError: when there is no such window.
    """
    sums: dict[str, dict[str, float]] = {}
    for bucket in (await _buckets(redis, window)).values():
        for name, counters in bucket.items():
            total = sums.setdefault(name, {})
            for counter, number in counters.items():
                total[counter] = total.get(counter, 0) + number
    return [_stats(name, sums[name]) for name in sorted(sums)]


async def _buckets(redis: Redis, window: str) -> dict[int, dict[str, dict[str, float]]]:
    """Number of the bucket -> task -> counter -> number."""
    if window not in _WINDOWS:
        raise ValueError(f"there is no window {window!r}; there are {' and '.join(_WINDOWS)}")
    period, seconds, number = _WINDOWS[window]
    present = int(await server_time(redis)) // seconds
    buckets = list(range(present - number, present + 1))
    replies = await inspection.counters(redis, period, buckets)
    found = {}
    for bucket, reply in zip(buckets, replies, strict=True):
        with reading(inspection.counter_key(period, bucket)):
            found[bucket] = {
                text(name): dict(msgpack.unpackb(packed)) for name, packed in as_mapping(reply).items()
            }
    return found


def _stats(name: str, sums: Mapping[str, float]) -> TaskStats:
    done, failed = int(sums.get("done", 0)), int(sums.get("failed", 0))
    attempts = done + failed
    return TaskStats(
        task_name=name,
        done=done,
        failed=failed,
        retried=int(sums.get("retried", 0)),
        dead=int(sums.get("dead", 0)),
        failure_rate=failed / attempts if attempts else None,
        run=_distribution(sums, "r", "run"),
        queue=_distribution(sums, "q", "queue"),
    )


def _distribution(sums: Mapping[str, float], prefix: str, total: str) -> Distribution:
    histogram = sorted(
        (int(counter[1:]), int(number))
        for counter, number in sums.items()
        if counter[0] == prefix and counter[1:].isdigit()
    )
    count = sum(number for _, number in histogram)

    def percentile(share: float) -> float | None:
        passed = 0
        for bucket, number in histogram:
            passed += number
            if passed >= share * count:
                return end_of_bucket(bucket)
        return None

    return Distribution(
        count=count,
        mean_seconds=sums.get(total, 0.0) / count if count else None,  # counters of 0 are left out
        p50_seconds=percentile(0.5),
        p95_seconds=percentile(0.95),
        p99_seconds=percentile(0.99),
    )


async def history(redis: Redis) -> list[Point]:
    """The past hour, minute by minute, oldest first: for charts."""
    ended = await _buckets(redis, "hour")
    minutes = list(ended)
    replies = await inspection.throughput(redis, minutes)
    flows = [{text(name): int(value) for name, value in as_mapping(reply).items()} for reply in replies]
    points = []
    for position, minute in enumerate(minutes):
        flow, following = flows[position], flows[position + 1] if position + 1 < len(flows) else {}
        submitted = None
        if "at" in flow and "at" in following:
            submitted = max(0, _sum(following, " added") - _sum(flow, " added"))
        points.append(
            Point(
                at=moment(60 * minute),
                submitted=submitted,
                done=int(sum(counters.get("done", 0) for counters in ended[minute].values())),
                failed=int(sum(counters.get("failed", 0) for counters in ended[minute].values())),
                backlog=_sum(flow, " length") if "at" in flow else None,
            )
        )
    return points


def _sum(flow: Mapping[str, int], suffix: str) -> int:
    return sum(value for name, value in flow.items() if name.endswith(suffix))


async def failed_task_names(redis: Redis) -> list[str]:
    """Registry names of the tasks of which failures are kept."""
    names: set[str] = set()
    begin = "+"
    while True:
        entries = await inspection.failed_attempts(redis, begin, _FAILURES_READ)
        with reading(inspection.FAILURES):
            names.update(str(loads(fields[b"data"])["task_name"]) for _, fields in entries)
        if len(entries) < _FAILURES_READ:
            return sorted(names)
        begin = f"({text(entries[-1][0])}"


async def failures(
    redis: Redis, limit: int = 100, after: str | None = None, *, task_name: str | None = None
) -> Page[Failure]:
    """Failed attempts, newest first. The last 500 or so are kept, for a week.

    Args:
        task_name: only of this task: `category:ClassName`, or the class name alone.

    Raises:
        ValueError: when `after` is not from a page, or several tasks have that class name.
    """
    if task_name is not None and ":" not in task_name:
        task_name = resolve_task_name(task_name, await failed_task_names(redis)) or task_name
    found: list[Failure] = []
    begin = "+" if after is None else f"({place_in_stream(after)}"
    while len(found) <= limit:
        entries = await inspection.failed_attempts(redis, begin, _FAILURES_READ)
        for entry, fields in entries:
            with reading(inspection.FAILURES):
                failure = loads(fields[b"data"])
                if task_name is None or failure["task_name"] == task_name:
                    found.append(Failure(**{**failure, "id": text(entry), "at": moment(failure["at"])}))
            begin = f"({text(entry)}"
        if len(entries) < _FAILURES_READ:
            break
    return Page(items=found[:limit], after=found[limit - 1].id if len(found) > limit else None)
