"""Read models of workers and running tasks, from the reports of workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from ..plumbing.broker import worker_state
from ..plumbing.broker.inspection import server_time, stream_heads
from ..plumbing.broker.stored import moment_of, number_of, reading, typed
from ..plumbing.messages.codec import loads
from .cursors import HEAD_BYTES, Registry, parse_cursor, queue_of, read_head
from .models import BlockedLoop, Page, RunningTask, Worker

#: How long a dead worker is listed after its last report.
_DEAD_WORKER_SECONDS = 180.0
#: Offset of scores in the set of leases by size, see lua/reclaim.lua.
_SIZE_MS = 1e13
_SIZES = {"small": 0, "medium": 1, "large": 2}


@dataclass(frozen=True, slots=True)
class ReportedTask:
    """A running task, as reported by its worker: times in s since 1970, key and owner of each lock."""

    task_id: str
    task_name: str
    vo: str | None
    stream: str
    entry: str
    deliveries: int
    attempt: int
    since: float
    locks: list[tuple[str, str]]
    overdue_since: float | None = None


async def alive_workers(redis: Redis) -> list[str]:
    """Return the names of workers whose lease has not been removed."""
    return sorted(await worker_state.leases(redis))


async def workers(redis: Redis) -> list[Worker]:
    """Return the workers that are alive, hold tasks, or reported in the last three minutes, by size and name."""
    lease = {name: ends_ms % _SIZE_MS / 1000 for name, ends_ms in (await worker_state.leases(redis)).items()}
    seen = {name: at_ms / 1000 for name, at_ms in (await worker_state.report_times(redis)).items()}
    now = await server_time(redis)
    names = sorted({*lease, *(name for name, at in seen.items() if at > now - _DEAD_WORKER_SECONDS)})
    reports = await worker_state.reports(redis, names, "line", "blocked")
    found = []
    for name in names:
        line, blocked = reports[name]
        host, _, rest = name.partition(":")
        pid = rest.partition(":")[0]
        with reading(worker_state.report_key(name)):
            report: dict[str, Any] = loads(line) if line else {}
            started = report.pop("started", None)
            found.append(
                typed(
                    Worker,
                    {
                        **report,
                        "name": name,
                        "host": host,
                        "pid": number_of(pid),
                        "alive": lease.get(name, 0.0) > now,
                        "lease_until": moment_of(lease[name]) if lease.get(name) else None,
                        "started": None if started is None else moment_of(started),
                        "seen": moment_of(seen[name]) if name in seen else None,
                        "blocked": _blocked(blocked),
                    },
                )
            )
    return sorted(found, key=lambda worker: (_SIZES.get(worker.size or "", 3), worker.name))


def _blocked(report: bytes | None) -> BlockedLoop | None:
    if not report:
        return None
    fields = loads(report)
    return typed(BlockedLoop, fields | {"since": moment_of(fields["since"])})


async def reported_running(redis: Redis, names: Sequence[str]) -> dict[str, list[ReportedTask]]:
    """Return the running tasks that each worker reported."""
    reports = await worker_state.reports(redis, names, "running")
    return {name: _reported(name, tasks) for name, [tasks] in reports.items()}


def _reported(worker: str, tasks: bytes | None) -> list[ReportedTask]:
    with reading(worker_state.report_key(worker)):
        return typed(list[ReportedTask], loads(tasks) if tasks else [])


async def running(
    redis: Redis, limit: int = 100, after: str | None = None, *, registry: Registry | None = None
) -> Page[RunningTask]:
    """Return the running tasks, longest first. Each worker reports at most 200 tasks."""
    reports = await worker_state.reports(redis, await alive_workers(redis), "running", "blocked")
    reported, blocking = [], set()
    for name, (tasks, blocked) in reports.items():
        reported += [(task.since, task.task_id, name, task) for task in _reported(name, tasks)]
        with reading(worker_state.report_key(name)):
            if (loop := _blocked(blocked)) is not None:
                blocking.add(loop.task_id)
    reported.sort(key=lambda one: one[:3])
    if after is not None:
        place = parse_cursor(after)
        reported = [one for one in reported if one[:2] > place]
    page, more = reported[:limit], len(reported) > limit
    ranges = [(task.stream, task.entry, task.entry, 1) for *_, task in page]
    entries = await stream_heads(redis, ranges, HEAD_BYTES) if page else []
    items = []
    for (since, _, name, task), found in zip(page, entries, strict=True):
        heads = [read_head(fields.get(b"data", b""), length) for _, fields, length in found]
        items.append(
            RunningTask(
                task_id=task.task_id,
                task_name=task.task_name,
                vo=task.vo,
                queue=queue_of(task.stream),
                attempt=task.attempt,
                deliveries=task.deliveries,
                since=moment_of(since),
                worker=name,
                blocks_worker=task.task_id in blocking,
                locks=[key for key, _ in task.locks],
                arguments=heads[0].arguments(registry) if heads else None,
                message_bytes=heads[0].bytes if heads else None,
            )
        )
    return Page(items=items, after=f"{page[-1][0]!r} {page[-1][1]}" if more else None)
