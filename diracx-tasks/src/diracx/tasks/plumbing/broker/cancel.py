"""Cancels tasks: queued, delayed, waiting for a lock, or running.

First each task is marked: a worker that gets its delivery finds the mark and does not start it. Then the task is
searched for. The delayed set is indexed by task id; the streams are not, and are scanned in small parts, so that a
queue of a million tasks delays no other command. Running tasks are at the heads of the streams, and their workers
are notified.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from ..exceptions import TaskCancelledError
from ..messages.error_info import describe_exception
from . import keys, scripts
from .effects import completion_effects
from .groups import group_of, request_audit
from .models import TaskMessage, TaskResult
from .stored import SCANNED

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from .requests import CancelRequest

#: How long the mark of a running task is kept, in case its worker misses the notification: 7 days.
MARK_SECONDS = 604_800
#: Stream entries that one script call examines: about 1 ms of the server's time.
FIND_BATCH = 200
#: Tasks that one script call cancels.
CANCEL_BATCH = 100
#: Rounds of the search: a task that moves during a round can be missed. The mark covers a task missed in all
#: rounds.
_ROUNDS = 3
_CANCELLED = "cancelled before it had begun"


class TaskPlace(StrEnum):
    """State in which a task was found."""

    QUEUED = "queued"
    DELAYED = "delayed"
    """Until its `at_time`."""
    RETRYING = "retrying"
    """Between a failed attempt and the next."""
    WAITING = "waiting"
    """For a lock, or for quota."""
    RUNNING = "running"
    """Held by a worker, which is notified to cancel it."""
    UNKNOWN = "unknown"
    """Not found: there never was such a task, or it has ended."""


_PLACES = {
    "queued": TaskPlace.QUEUED,
    "at_time": TaskPlace.DELAYED,
    "retry": TaskPlace.RETRYING,
    "lock": TaskPlace.WAITING,
    "rate": TaskPlace.WAITING,
    "running": TaskPlace.RUNNING,
}


async def cancel(redis: Redis, task_ids: Sequence[str], result_ttl_seconds: float | None) -> dict[str, TaskPlace]:
    """See `RedisStreamBroker.cancel`. Due tasks must have been promoted to their streams before."""
    search = CancellationSearch(redis, task_ids, result_ttl_seconds)
    try:
        for round_ in range(_ROUNDS):
            await search.request([{"task": task, "marked": round_} for task in search.missing])
            await search.search_streams()
            if not search.missing:
                break
    finally:
        await search.unmark()
    return {task: search.found.get(task, TaskPlace.UNKNOWN) for task in task_ids}


class CancellationSearch:
    """Searches for the tasks of one cancellation, and cancels each where it is found."""

    def __init__(self, redis: Redis, task_ids: Sequence[str], ttl_seconds: float | None) -> None:
        self._redis = redis
        self._ttl_seconds = ttl_seconds
        self._begin = dict.fromkeys(keys.EVERY_STREAM, "-")
        self.missing = dict.fromkeys(task_ids)
        self.found: dict[str, TaskPlace] = {}

    async def request(self, requests: Sequence[CancelRequest]) -> None:
        """Cancel tasks at their supposed positions; for a delayed one, read the returned message and repeat."""
        first = 0
        while first < len(requests):
            batch = requests[first : first + CANCEL_BATCH]
            replies = await scripts.cancel(self._redis, MARK_SECONDS * 1000, batch)
            first += len(replies)
            again: list[CancelRequest] = []
            for request, (place, message) in zip(batch, replies, strict=False):
                task = request["task"]
                if message:
                    again.append(await self._with_effects(task, message))
                elif place:
                    self.found[task] = _PLACES[place]
                    self.missing.pop(task, None)
            await self.request(again)

    async def search_streams(self) -> None:
        """Scan all streams in parallel, from the end of the last scan: running tasks are at their heads."""
        unread = list(self._begin)
        while unread and self.missing:
            for stream in list(unread):
                last, found = await scripts.find(self._redis, stream, self._begin[stream], FIND_BATCH)
                if last:
                    self._begin[stream] = f"({last}"
                else:
                    unread.remove(stream)
                await self.request(
                    [
                        {**await self._with_effects(task, message), "stream": stream, "entry": entry}
                        for task, entry, message in found
                        if task in self.missing  # skip tasks marked by another call
                    ]
                )

    async def unmark(self) -> None:
        """Remove the marks of tasks that were not found. A missing mark was removed by the task's settlement."""
        tasks = list(self.missing)
        if not tasks:
            return
        await self._announce_to_workers_after_data_loss(tasks)
        for first in range(0, len(tasks), FIND_BATCH):
            batch = tasks[first : first + FIND_BATCH]
            async with self._redis.pipeline(transaction=False) as pipe:
                for task in batch:
                    pipe.zrem(keys.CANCELLED, task)
                removed = await pipe.execute()
            for task, was_marked in zip(batch, removed, strict=True):
                if not was_marked:
                    self.found[task] = TaskPlace.RUNNING
                    del self.missing[task]

    async def _announce_to_workers_after_data_loss(self, tasks: Sequence[str]) -> None:
        """Notify workers of tasks that go on after a loss of the server's data, and are in no stream any more."""
        redis = self._redis
        alive: Any = await redis.zrange(keys.ALIVE, 0, -1)
        workers = [worker.decode(errors="replace") for worker in alive]
        cursors = dict.fromkeys(workers, 0)
        recording = set()
        while cursors:
            async with redis.pipeline(transaction=False) as pipe:
                for worker, cursor in cursors.items():
                    pipe.hscan(keys.HELD_PREFIX + worker, cursor, match="entry:*", count=SCANNED)
                found = await pipe.execute(raise_on_error=False)
            previous, cursors = cursors, {}
            for worker, reply in zip(previous, found, strict=True):
                if isinstance(reply, Exception):  # a key of the wrong type
                    continue
                cursor, records = reply
                if records:
                    recording.add(worker)
                elif cursor:
                    cursors[worker] = cursor
        for worker in workers:
            if worker in recording:
                for first in range(0, len(tasks), CANCEL_BATCH):
                    announced = scripts.pack(tasks[first : first + CANCEL_BATCH])
                    await redis.publish(keys.CANCELLED_CHANNEL_PREFIX + worker, announced)

    async def _with_effects(self, task: str, data: bytes) -> CancelRequest:
        request: CancelRequest = {"task": task, "known": 1, "marked": 1}
        readable = _add_effects(request, data, self._ttl_seconds)
        if not readable and (group := await group_of(self._redis, task.encode())):
            error = f"{TaskCancelledError.__name__}: {_CANCELLED}"
            request["group"] = {"id": group, "child": task, "error": error}
        return request


async def cancel_waiting(redis: Redis, stream: str, entries: Sequence[tuple[str, bytes]]) -> int:
    """Cancel tasks that wait in a stream, but not those that a worker has taken meanwhile.

    Args:
        entries: id and message of each.

    Returns:
        Number of cancelled tasks.
    """
    places: list[tuple[str, bytes]] = []
    unreadable = False
    while len(places) < len(entries):
        requests: list[CancelRequest] = []
        for entry, data in entries[len(places) : len(places) + CANCEL_BATCH]:
            try:
                task = TaskMessage.loadb(data).task_id
            except ValueError:
                task, unreadable = "", True
            requests.append({"task": task, "stream": stream, "entry": entry, "known": 1, "waiting": 1})
            _add_effects(requests[-1], data, None)
        places += await scripts.cancel(redis, MARK_SECONDS * 1000, requests)
    if unreadable:
        await request_audit(redis)
    return sum(place == "queued" for place, _ in places)


def _add_effects(request: CancelRequest, data: bytes, ttl_seconds: float | None) -> bool:
    """Add the completion effects of a task that is cancelled before its start.

    Returns False when the message cannot be read, such as one of a later version.
    """
    try:
        message = TaskMessage.loadb(data)
    except ValueError:
        return False
    error = TaskCancelledError(_CANCELLED)
    make = partial(TaskResult.from_exception, error, 0.0)
    request |= cast(
        "CancelRequest", completion_effects(message, make, describe_exception(error), 0.0, ttl_seconds)
    )
    return True
