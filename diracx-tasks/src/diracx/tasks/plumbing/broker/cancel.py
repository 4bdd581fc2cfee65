"""Cancelling tasks, wherever they are: queued, delayed, waiting for a lock, or running.

First each task is marked, which takes effect for what is about to run: workers find the mark with whatever they
take in. Then its place is looked for. The delayed set knows tasks by their id; the streams do not, and are gone
through in small parts, so that a queue of a million tasks holds up nobody. What runs is found at their heads, and
the worker that runs it is told.
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
from .groups import ask_for_audit, group_of
from .models import TaskMessage, TaskResult
from .stored import SCANNED

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from .requests import CancelRequest

#: How long a mark outlives its cancellation, should the worker that runs the task never hear of it: 7 days.
MARK_SECONDS = 604_800
#: Stream entries that one script call looks at, one by one: about a ms of the server's time.
FIND_BATCH = 200
#: Tasks that one script call cancels.
CANCEL_BATCH = 100
#: A task that moved while we looked for it is behind us once; more often is bad luck, and the mark is there.
_ROUNDS = 3
_CANCELLED = "cancelled before it had begun"


class TaskPlace(StrEnum):
    """Place in which a task was found."""

    QUEUED = "queued"
    DELAYED = "delayed"
    """Until the time that `schedule(at_time=…)` gave."""
    RETRYING = "retrying"
    """Between a failed attempt and the next."""
    WAITING = "waiting"
    """For a lock, or for quota."""
    RUNNING = "running"
    """In the hands of a worker, which is told to cancel it."""
    UNKNOWN = "unknown"
    """Nowhere: there never was such a task, or it has ended."""


_PLACES = {
    "queued": TaskPlace.QUEUED,
    "at_time": TaskPlace.DELAYED,
    "retry": TaskPlace.RETRYING,
    "lock": TaskPlace.WAITING,
    "rate": TaskPlace.WAITING,
    "running": TaskPlace.RUNNING,
}


async def cancel(redis: Redis, task_ids: Sequence[str], result_ttl_seconds: float | None) -> dict[str, TaskPlace]:
    """See `RedisStreamBroker.cancel`. Whatever is due has to be in its stream."""
    search = CancellationSearch(redis, task_ids, result_ttl_seconds)
    try:
        for turn in range(_ROUNDS):
            await search.ask([{"task": task, "marked": turn} for task in search.missing])
            await search.look_into_streams()
            if not search.missing:
                break
    finally:
        await search.unmark()
    return {task: search.found.get(task, TaskPlace.UNKNOWN) for task in task_ids}


class CancellationSearch:
    def __init__(self, redis: Redis, task_ids: Sequence[str], ttl_seconds: float | None) -> None:
        self._redis = redis
        self._ttl_seconds = ttl_seconds
        self._begin = dict.fromkeys(keys.EVERY_STREAM, "-")
        self.missing = dict.fromkeys(task_ids)
        self.found: dict[str, TaskPlace] = {}

    async def ask(self, wanted: Sequence[CancelRequest]) -> None:
        """Cancel what is where we believe it to be; of the delayed ones, look at the message and ask again."""
        first = 0
        while first < len(wanted):
            batch = wanted[first : first + CANCEL_BATCH]
            replies = await scripts.cancel(self._redis, MARK_SECONDS * 1000, batch)
            first += len(replies)
            again: list[CancelRequest] = []
            for asked, (place, message) in zip(batch, replies, strict=False):
                task = asked["task"]
                if message:
                    again.append(await self._known(task, message))
                elif place:
                    self.found[task] = _PLACES[place]
                    self.missing.pop(task, None)
            await self.ask(again)

    async def look_into_streams(self) -> None:
        """Go through all streams, side by side, from where the last look ended: what runs is at their heads."""
        unread = list(self._begin)
        while unread and self.missing:
            for stream in list(unread):
                last, found = await scripts.find(self._redis, stream, self._begin[stream], FIND_BATCH)
                if last:
                    self._begin[stream] = f"({last}"
                else:
                    unread.remove(stream)
                await self.ask(
                    [
                        {**await self._known(task, message), "stream": stream, "entry": entry}
                        for task, entry, message in found
                        if task in self.missing  # and not one that another call cancels
                    ]
                )

    async def unmark(self) -> None:
        """Remove the marks of tasks that were found nowhere. One that is gone was taken away by the settlement."""
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
        """Announce tasks that run on after a loss of the server's data: only their workers know of them."""
        redis = self._redis
        alive: Any = await redis.zrange(keys.ALIVE, 0, -1)
        workers = [worker.decode(errors="replace") for worker in alive]
        cursors = dict.fromkeys(workers, 0)
        noting = set()
        while cursors:
            async with redis.pipeline(transaction=False) as pipe:
                for worker, cursor in cursors.items():
                    pipe.hscan(keys.HELD_PREFIX + worker, cursor, match="entry:*", count=SCANNED)
                found = await pipe.execute(raise_on_error=False)
            asked, cursors = cursors, {}
            for worker, answer in zip(asked, found, strict=True):
                if isinstance(answer, Exception):  # a key of another type
                    continue
                cursor, noted = answer
                if noted:
                    noting.add(worker)
                elif cursor:
                    cursors[worker] = cursor
        for worker in workers:
            if worker in noting:
                for first in range(0, len(tasks), CANCEL_BATCH):
                    announced = scripts.pack(tasks[first : first + CANCEL_BATCH])
                    await redis.publish(keys.CANCELLED_CHANNEL_PREFIX + worker, announced)

    async def _known(self, task: str, data: bytes) -> CancelRequest:
        request: CancelRequest = {"task": task, "known": 1, "marked": 1}
        known = _add_effects(request, data, self._ttl_seconds)
        if not known and (group := await group_of(self._redis, task.encode())):
            error = f"{TaskCancelledError.__name__}: {_CANCELLED}"
            request["group"] = {"id": group, "child": task, "error": error}
        return request


async def cancel_waiting(redis: Redis, stream: str, entries: Sequence[tuple[str, bytes]]) -> int:
    """Cancel tasks that wait in a stream. Whatever a worker has taken meanwhile goes on.

    Args:
        entries: id and message of each.

    Returns:
        How many still waited.
    """
    places: list[tuple[str, bytes]] = []
    unreadable = False
    while len(places) < len(entries):
        wanted: list[CancelRequest] = []
        for entry, data in entries[len(places) : len(places) + CANCEL_BATCH]:
            try:
                task = TaskMessage.loadb(data).task_id
            except ValueError:
                task, unreadable = "", True
            wanted.append({"task": task, "stream": stream, "entry": entry, "known": 1, "waiting": 1})
            _add_effects(wanted[-1], data, None)
        places += await scripts.cancel(redis, MARK_SECONDS * 1000, wanted)
    if unreadable:
        await ask_for_audit(redis)
    return sum(place == "queued" for place, _ in places)


def _add_effects(request: CancelRequest, data: bytes, ttl_seconds: float | None) -> bool:
    """Add what follows from the end of a task that is cancelled before it began.

    False when it cannot be read, as one of a later version.
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
