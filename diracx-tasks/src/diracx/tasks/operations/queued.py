"""Read models of queues, queued and delayed tasks, and the purge of queues."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from redis.asyncio import Redis

from ..plumbing.broker import inspection
from ..plumbing.broker.cancel import cancel_waiting
from ..plumbing.broker.server_check import read_memory
from ..plumbing.broker.stored import moment_of, number_of, text_of
from ..plumbing.broker.streams import ALL_STREAM_NAMES
from .cursors import (
    HEAD_BYTES,
    PAGE,
    Registry,
    check_stream_cursor,
    entry_parts,
    parse_cursor,
    queue_of,
    read_head,
    streams_of_queue,
    waiting_heads,
    wrong_cursor,
)
from .models import DELAY_REASONS, DelayedTask, DelayReason, Page, Queue, QueuedTask, Snapshot
from .processes import workers

#: Maximum number of delayed tasks that are searched for a reason, and of one step of it.
DELAYED_SEARCHED = 20_000
_SEARCHED_AT_ONCE = 500
#: More than stream and reason at the head of a delayed task.
_REASON_BYTES = 100
_LONGEST_ERROR = 300
_DELAYED_FIELDS = 5


async def snapshot(redis: Redis) -> Snapshot:
    """Read the state of the whole system, in a time that does not depend on the number of queued tasks."""
    found = await inspection.snapshot(redis)
    memory = await read_memory(redis)
    counted = dict(zip(found["delayed"][::2], found["delayed"][1::2], strict=True))
    return Snapshot(
        at=moment_of(found["now"] / 1000),
        queues=_queues(found),
        workers=await workers(redis),
        delayed={reason: number_of(counted.get(reason)) for reason in DELAY_REASONS},
        overdue=found["overdue"],
        schedules=found["schedules"],
        schedules_late=found["late"],
        schedule_lateness_seconds=found["schedule_lateness"] / 1000,
        delayed_lateness_seconds=found["delayed_lateness"] / 1000,
        scheduler_leads=found["leads"] == 1,
        groups=found["groups"],
        groups_stuck=found["groups_stuck"],
        dead_letters_waiting=found["dead"],
        dead_letters_waiting_since=moment_of(found["dead_since"] / 1000) if "dead_since" in found else None,
        memory_bytes=memory.used_bytes,
        memory_limit_bytes=memory.limit_bytes,
        memory_policy=memory.policy,
    )


async def queues(redis: Redis) -> list[Queue]:
    """Return the nine queues by priority."""
    return _queues(await inspection.snapshot(redis))


def _queues(found: dict[str, Any]) -> list[Queue]:
    now = found["now"] / 1000
    since_ms, flow = found.get("flow", (None, {}))
    seconds = 0.0 if since_ms is None else now - since_ms / 1000
    shown = []
    for stream, (length, taken, oldest_us, added) in zip(ALL_STREAM_NAMES, found["queues"], strict=True):
        name = queue_of(stream)
        priority, size = name.split(":")
        submitted = max(0.0, added - flow.get(f"{stream} added", 0))
        backlog = max(0, length - taken)
        shown.append(
            Queue(
                name=name,
                priority=priority,
                size=size,
                backlog=backlog,
                running=taken,
                oldest_waiting_seconds=max(0.0, now - oldest_us / 1e6) if backlog and oldest_us else None,
                in_per_second=submitted / seconds if seconds > 0 else None,
                out_per_second=flow.get(f"{stream} ended", 0) / seconds if seconds > 0 else None,
            )
        )
    return shown


async def peek(
    redis: Redis, queue: str, limit: int = 100, after: str | None = None, *, registry: Registry | None = None
) -> Page[QueuedTask]:
    """Return the tasks that wait in a queue (`{priority}:{size}`), in the order of delivery."""
    found: list[QueuedTask] = []
    streams = streams_of_queue(queue)
    where, _, entry = (after or "").rpartition(" ")
    if after is not None:
        if where not in streams:
            raise wrong_cursor()
        check_stream_cursor(entry)
        streams = streams[streams.index(where) :]
    for stream in streams:
        begin = entry if stream == where else None
        while len(found) <= limit:
            entries = await waiting_heads(redis, stream, begin, min(PAGE, limit + 1))
            found += [_queued(stream, *entry, registry) for entry in entries]
            if not entries:
                break
            begin = entries[-1][0]
    page = found[:limit]
    last = f"{page[-1].stream} {page[-1].entry}" if len(found) > limit and page else None
    return Page(items=page, after=last)


def _queued(
    stream: str, entry: str, fields: dict[bytes, bytes], length: int, registry: Registry | None
) -> QueuedTask:
    since_us = number_of(fields.get(b"since"))
    waiting_since = since_us / 1e6 if since_us else entry_parts(entry)[0] / 1e3
    head = read_head(fields.get(b"data", b""), length)
    failed = head.failed_attempts
    return QueuedTask(
        task_id="" if head.message is None else head.message.task_id,
        task_name=head.task_name,
        queue=queue_of(stream),
        stream=stream,
        entry=entry,
        waiting_since=moment_of(waiting_since),
        attempt=None if failed is None else failed + 1,
        arguments=head.arguments(registry),
        vo=head.vo(registry),
        message_bytes=length,
    )


async def purge(redis: Redis, queue: str) -> int:
    """Cancel the tasks that wait in a queue (`{priority}:{size}`), but not those submitted meanwhile.

    Their groups, and clients that wait for their results, are notified. Returns the number of tasks.
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
    """Return a message up to its labels if it is large."""
    head = read_head(data, length)
    if head.message is None or head.whole:
        return data
    if head.labels_known:
        return head.message.dumpb()
    return await inspection.entry_data(redis, stream, entry) or data


async def delayed(
    redis: Redis,
    reason: DelayReason | None = None,
    limit: int = 100,
    after: str | None = None,
    *,
    registry: Registry | None = None,
    at_most: int = DELAYED_SEARCHED,
) -> Page[DelayedTask]:
    """Return delayed tasks by due time.

    With a reason, a call searches `at_most` tasks: a page with few items need not be the last.
    """
    if reason is not None and reason not in DELAY_REASONS:
        raise ValueError(f"no reason {reason!r}; the reasons are {', '.join(DELAY_REASONS)}")
    place = (-math.inf, "") if after is None else parse_cursor(after)
    existing = math.inf if reason is None else await inspection.delayed_number(redis, reason)
    begin, searched = repr(place[0]), 0
    offset = 0 if after is None else await inspection.delayed_offset(redis, *place)
    found: list[DelayedTask] = []
    while len(found) < min(limit, existing) and searched < at_most:
        count = PAGE if reason is None else _SEARCHED_AT_ONCE
        page = await inspection.delayed_page(redis, begin, offset + searched, count)
        if not page:
            return Page(items=await _with_lines(redis, found))
        searched += len(page)
        chosen = page if reason is None else await _of_reason(redis, page, reason)
        rest = chosen[limit - len(found) :]
        chosen = chosen[: limit - len(found)]
        place = (chosen if rest else page)[-1]
        heads = await inspection.delayed_heads(redis, [task for _, task in chosen], HEAD_BYTES)
        found += [
            _delayed(task, score, *head, registry)
            for (score, task), head in zip(chosen, heads, strict=True)
            if head is not None
        ]
    more = None if len(found) >= existing else f"{place[0]!r} {place[1]}"
    return Page(items=await _with_lines(redis, found), after=more)


async def _of_reason(redis: Redis, tasks: Sequence[tuple[float, str]], reason: str) -> list[tuple[float, str]]:
    """Return those of the tasks that are delayed for this reason."""
    heads = await inspection.delayed_heads(redis, [task for _, task in tasks], _REASON_BYTES)
    return [
        task
        for task, head in zip(tasks, heads, strict=True)
        if head is not None and text_of(head[0]).split(" ")[1:2] == [reason]
    ]


async def _with_lines(redis: Redis, tasks: list[DelayedTask]) -> list[DelayedTask]:
    """Set the due time of tasks that wait for a lock: the next poll of its line."""
    locks = sorted({task.lock for task in tasks if task.lock})
    if not locks:
        return tasks
    polls = await inspection.line_times(redis, locks)
    return [
        task if (due := polls.get(task.lock or "")) is None else replace(task, due=moment_of(float(due) / 1000))
        for task in tasks
    ]


def _delayed(task: str, due_ms: float, stored: bytes, length: int, registry: Registry | None) -> DelayedTask:
    header, _, data = stored.partition(b"\n")
    parts = text_of(header).split(" ", _DELAYED_FIELDS - 1)
    stream, reason, since = [*parts, "", "", ""][:3]
    waiting_since_us = number_of(since.partition("@")[0])  # followed by the occurrence of a schedule
    head = read_head(data, length - len(header) - 1)
    attempts = head.message.attempts if head.failed_attempts and head.message is not None else []
    error = f"{attempts[-1].get('type', '?')}: {attempts[-1].get('message', '')}" if attempts else None
    return DelayedTask(
        task_id=task,
        task_name=head.task_name,
        queue=queue_of(stream),
        reason=cast("DelayReason", reason),
        due=moment_of(due_ms / 1000),
        waiting_since=moment_of(waiting_since_us / 1e6) if waiting_since_us else None,
        lock=parts[_DELAYED_FIELDS - 1] if len(parts) == _DELAYED_FIELDS else None,
        failed_attempts=head.failed_attempts,
        last_error=None if error is None else error[:_LONGEST_ERROR],
        arguments=head.arguments(registry),
        vo=head.vo(registry),
        message_bytes=head.bytes,
    )
