"""The broker: the operations that change the state of a task, each one atomic step on the server.

    submit → fetch | reclaim → start → settle      promote (delayed → queued)

`docs/explanation/transitions.md` lists each transition with its script.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import msgpack
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, OutOfMemoryError, RedisError, ResponseError

from .._util.passwords import mask
from ..enums import Size
from . import cancel, keys, published, scripts, submitting
from .clients import DirectConnection, close_spare
from .connection import async_client
from .keys import ALL_STREAM_NAMES, stream_name_for
from .labels import stream_of_labels
from .lease_audit import audit_leases
from .locking import RELEASE_BATCH
from .models import Delivery, Settlement, Submission, TaskMessage, candidate_from
from .requests import RESUBMITTED_TTL_SECONDS
from .result_backend import ResultReader
from .schema_version import check_version, note_version
from .scripts import EVERY_STREAM, script
from .server_check import Role, UnusableServerError, obstacle, read_server
from .sizes import CALL_BYTES, in_calls
from .stored import SCANNED, text_of
from .telemetry import Counts, submission_spans

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from .models import SettlingCall
    from .replies import SettleReply, StartReply
    from .requests import GroupFields, LockSpec, StartRequest

__all__ = ["ALL_STREAM_NAMES", "RedisStreamBroker", "stream_name_for"]

#: Names of all streams, size by size, for lua/reclaim.lua.
_STREAMS_BY_SIZE = msgpack.packb([keys.streams_of(size) for size in Size])

logger = logging.getLogger(__name__)

#: Locks with waiting tasks that one script call polls.
LINES_BATCH = 50
#: Tasks promoted by one script call: 1 ms of the server's time, with a million of them.
PROMOTE_BATCH = 100
#: Messages that one call of `fetch_unacknowledged` returns.
UNACKNOWLEDGED_BATCH = 100
#: Settlements in one script call.
SETTLE_BATCH = 200


#: Awaits the deliveries of a fetch; without any, the last id of each stream.
FetchReply = Callable[[], Awaitable[tuple[list[Delivery], list[str]]]]


def new_worker_id() -> str:
    """Make a name for a worker that contains its host and process: `host:pid:random`."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"


class RedisStreamBroker(ResultReader):
    """Messages in the streams of one Redis or Valkey server.

    Args:
        url: `redis://`, `rediss://`, `unix://` or `redis+sentinel://` address: see `address.py`.
        worker_size: size of the worker that fetches through this broker.
        consumer_name: name of that worker; a unique one by default.
        max_connection_pool_size: limit of connections for commands, at least 2; callers wait for a free one.
            Blocking reads and subscriptions use up to 3 more. By default the limit in the URL, or none.
        connection_kwargs: passed to redis-py.

    Raises:
        AddressError: when the URL is malformed; a ValueError.
    """

    def __init__(
        self,
        url: str,
        *,
        worker_size: Size | str = Size.MEDIUM,
        consumer_name: str | None = None,
        max_connection_pool_size: int | None = None,
        **connection_kwargs: Any,
    ) -> None:
        self.url = url
        self.worker_size = Size(worker_size)
        self.consumer_name = consumer_name or new_worker_id()
        self.streams = keys.streams_of(self.worker_size)
        self.counts = Counts()
        # No retries in the client: it would send a submission again whose reply was lost. Callers whose calls are
        # safe to repeat (the worker) retry themselves.
        self.redis: Redis = async_client(
            url,
            max_connections=max_connection_pool_size,
            **{"retry": Retry(NoBackoff(), 0), **connection_kwargs},
        )
        self._submitting, self._waiting = DirectConnection(self.redis), DirectConnection(self.redis)
        self._large_bytes = 1
        """Approximate size of the largest recent message."""

    @property
    def reconnects(self) -> int:
        """Number of lost connections that were opened again, perhaps to another server."""
        pool: Any = self.redis.connection_pool
        return int(pool.reconnects)

    @property
    def reply_timeout_seconds(self) -> float:
        """Timeout of replies, after which the connection counts as dead."""
        seconds: float | None = self.redis.connection_pool.connection_kwargs.get("socket_timeout")
        return seconds or float("inf")

    async def startup(self, role: Role | None = None) -> None:
        """Check that the server replies, and that the task system can work with it.

        Args:
            role: the role of this process, whose commands the server's user must be allowed to send.

        Raises:
            UnusableServerError: when the task system cannot work with the server.
            redis.exceptions.RedisError: when the server does not reply.
        """
        problem = obstacle(await read_server(self.redis, role, settings=False))
        if problem is None and role is Role.WORKER:
            other = await published.living_worker(self.redis)
            problem = other and f"is in use by {other}: stop it first, and start again 10 s after its end"
        if problem:
            raise UnusableServerError(f"Redis at {mask(self.url)} {problem}")
        if role in (Role.WORKER, Role.SCHEDULER):
            await check_version(self.redis)
            await note_version(self.redis)
        await self.close_spare_connections(0, keep=0)  # the next call may come much later

    async def close_spare_connections(self, unused_seconds: float, keep: int = 1) -> None:
        """Close connections that have been unused for `unused_seconds`, all but `keep`."""
        await close_spare(self.redis, unused_seconds, keep)

    async def shutdown(self) -> None:
        """Close all connections."""
        await self._submitting.close()
        await self._waiting.close()
        await self.redis.aclose()

    # --- submitting -------------------------------------------------------------------------------------

    async def enqueue(self, message: TaskMessage, stream: str | None = None) -> None:
        """Submit one message, by default to the queue of its labels `priority` and `size` (normal, medium)."""
        await self.submit([Submission(message, stream or stream_of_labels(message.labels))])

    async def submit(self, submissions: Sequence[Submission]) -> None:
        """Submit messages: one round trip per queue and 500 messages, and one per 100 delayed messages.

        Raises:
            SendTaskError: when the server could not be reached or refused.
            DuplicateTaskIdError: when two messages have the same id (nothing is sent then), or a delayed one has
                the id of another task that waits (nothing of its batch is sent).
            TypeError: when an argument cannot be encoded; nothing is sent then.
            TaskTooLargeError: when a message is too large; nothing is sent then.
        """
        with submission_spans(submissions):
            if len(submissions) == 1 and submissions[0].at_time is None:
                await self._submit_one(submissions[0])
            else:
                await submitting.submit(self.redis, submissions)
        self.counts.note_submitted(submissions)

    async def _submit_one(self, submission: Submission) -> None:
        data = submission.dumpb()
        command = ("XADD", submission.stream, "*", "data", data)
        try:
            if self._submitting.in_use:
                await self.redis.execute_command(*command)
                return
            [reply] = await self._submitting.execute(command)
            if isinstance(reply, Exception):
                raise reply
        except RedisError as error:
            raise submitting.send_error(submission.message.task_name, error, len(data)) from error

    async def submit_group(
        self, group_id: str, children: Sequence[Submission], fields: GroupFields, ttl_seconds: int
    ) -> None:
        """Create a callback group and submit its children: all of them or none.

        Each call takes the server a few ms at most, for any number of children. The children of a large group
        start when all of them have arrived. If this process dies before that, none starts; if later, workers go
        on.

        Raises:
            SendTaskError: when the server could not be reached or refused.
        """
        with submission_spans(children):
            reply = await submitting.submit_group(self.redis, group_id, children, fields, ttl_seconds)
        self.counts.note_submitted(children)
        if reply == 2:
            try:
                await self.promote(lines=False)
            except RedisError as error:
                logger.warning("group %s is submitted; workers will move its children: %s", group_id, error)

    async def resubmit(self, tickets: Sequence[tuple[str, Submission]]) -> list[bool]:
        """Submit dead letters again, each ticket once in `RESUBMITTED_TTL_SECONDS`. Safe to repeat.

        Returns:
            For each ticket, True if it was submitted now, False if it had been before.

        Raises:
            SendTaskError: when the server could not be reached or refused.
        """
        done = await submitting.resubmit(self.redis, tickets, RESUBMITTED_TTL_SECONDS * 1000)
        self.counts.note_submitted(submission for (_, submission), new in zip(tickets, done, strict=True) if new)
        return done

    # --- fetching ---------------------------------------------------------------------------------------

    async def fetch(
        self, free: int, *, lease_seconds: float = 0, last_ids: Sequence[str] = ()
    ) -> tuple[list[Delivery], list[str]]:
        """Reserve up to `free` messages, most urgent first.

        Args:
            lease_seconds: lease of the worker; a new one starts with this call if it has ended.
            last_ids: for each stream, an id up to which all is delivered.

        Returns:
            The deliveries; without any, the last id of each stream, from which to wait.
        """
        return await (await self.send_fetch(free, lease_seconds=lease_seconds, last_ids=last_ids))()

    async def send_fetch(
        self,
        free: int,
        *,
        lease_seconds: float = 0,
        last_ids: Sequence[str] = (),
        settling: SettlingCall | None = None,
    ) -> FetchReply:
        """Send a `fetch`. Returns a function that awaits its result; call it before any other method that fetches.

        Args:
            settling: settlements to send in the same write, before the fetch.
        """
        args = [self.consumer_name, self._call_limit(free), int(lease_seconds * 1000), *last_ids]
        fetch = ("EVALSHA", script("fetch").sha, len(self.streams), *self.streams, *args)
        if settling is None:
            await self._waiting.send(fetch)
        else:
            await self._waiting.send(scripts.settle_command(self.consumer_name, settling), fetch)
        return partial(self._read_fetch, args, last_ids, settling)

    async def _read_fetch(
        self, args: Sequence[Any], last_ids: Sequence[str], settling: SettlingCall | None
    ) -> tuple[list[Delivery], list[str]]:
        note = None if settling is None else partial(scripts.note_settled, settling)
        *_, reply = await self._waiting.replies(note)
        if isinstance(reply, NoScriptError):
            reply = await script("fetch")(self._waiting, self.streams, args)
        if isinstance(reply, Exception):
            raise reply
        messages, new_ids = reply
        if messages:
            return self._deliveries(messages), []
        now_last = [text_of(last_id) for last_id in new_ids] or list(last_ids)
        return [], [now or before for now, before in zip(now_last, last_ids or now_last, strict=True)]

    async def reserve_next(
        self,
        at_most: int,
        timeout: float,
        sent: Callable[[int], None] | None = None,
        settling: SettlingCall | None = None,
    ) -> tuple[list[Delivery], bool]:
        """Wait up to `timeout` seconds for messages, with a blocking read that reserves up to `at_most` per
        stream.

        The server gives them to this worker alone. Messages of several streams are sorted, most urgent first.

        Args:
            sent: called with the descriptor of the socket once the command is sent, before the reply is read.
            settling: settlements to send in the same write, before the read.

        Returns:
            The deliveries; and True if there are marks of cancelled tasks, so that the deliveries have to be
            checked with `fetch_unacknowledged`.

        Raises:
            redis.exceptions.ResponseError: a stream or group is missing, as after `end_wait`; `fetch` creates
                them.
        """
        group = ("XREADGROUP", "GROUP", keys.GROUP, self.consumer_name, "COUNT", self._call_limit(at_most))
        streams = (*self.streams, keys.WAIT_PREFIX + self.consumer_name)
        wait = (*group, "BLOCK", max(1, int(timeout * 1000)), "STREAMS", *streams, *[">"] * len(streams))
        marked = ("EXISTS", keys.CANCELLED)
        if settling is None:
            replies = await self._waiting.execute(wait, marked, sent=sent)
        else:
            settle = scripts.settle_command(self.consumer_name, settling)
            note = partial(scripts.note_settled, settling)
            _, *replies = await self._waiting.execute(settle, wait, marked, sent=sent, first=note)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        found, marks = replies
        messages: list[Any] = []
        for stream, entries in found or []:
            for entry, fields in entries:
                data = fields[1] if len(fields) == 2 and fields[0] == b"data" else fields
                messages += (self.streams.index(stream.decode()) + 1, entry, data, 1, 0)
        return self._deliveries(messages), bool(marks and messages)

    async def end_wait(self) -> None:
        """End `reserve_next` on the server. Later calls reserve nothing before the next `fetch`."""
        await self.redis.unlink(keys.WAIT_PREFIX + self.consumer_name)

    async def reclaim(
        self, free: int, *, audit: bool = False, lease_seconds: float = 30.0, max_deliveries: int = 3
    ) -> tuple[list[Delivery], float, bool]:
        """Reclaim up to `free` messages of dead workers, and fetch new ones from more urgent queues.

        Args:
            audit: also search for consumers missing on the list of workers, unless another worker has just done
                so.
            lease_seconds: the caller's lease, as for `fetch`.
            max_deliveries: a message that has lost this many workers will not run again. One that has lost nearly
                as many is a poison candidate: it is given to a worker that holds nothing else, so that it can kill
                no other task. That worker must not fetch meanwhile.

        Returns:
            The deliveries; the time until the next call (s): the end of the next lease, or 0, with the next free
            slot, if there were too few slots; and True if the worker has to drain for a poison candidate: fetch
            nothing until it holds nothing, then call again.
        """
        lease_ms = int(lease_seconds * 1000)
        if audit:
            await check_version(self.redis)
            with suppress(OutOfMemoryError):  # a full server accepts no new keys: try at the next audit
                await audit_leases(self.redis, self.consumer_name, lease_ms)
        args = [self.consumer_name, self._call_limit(free), _STREAMS_BY_SIZE, lease_ms]
        args += [candidate_from(max_deliveries), max_deliveries]
        messages, again_ms, drain = await script("reclaim")(self._waiting, self.streams, args)
        deliveries = self._deliveries(messages)
        self.counts.note_reclaimed(each for each in deliveries if each.deliveries > 1)
        return deliveries, again_ms / 1000, bool(drain)

    async def fetch_unacknowledged(
        self, known: Iterable[tuple[str, str]], locks: Iterable[LockSpec] | None = None
    ) -> list[Delivery]:
        """Return deliveries that were reserved for the worker in a call whose reply was lost.

        Args:
            known: stream and entry of each delivery that the worker holds.
            locks: locks that the worker holds; others that the server has recorded for it are released.
        """
        held = [f"{stream} {entry}" for stream, entry in known]
        unknown = [] if locks is None else await self._unknown_locks(locks)
        for part in in_calls(unknown, RELEASE_BATCH, lambda _: 0):
            await self._fetch_unacknowledged((), (), part)
        deliveries: list[Delivery] = []
        more = 1
        while more:
            messages, more = await self._fetch_unacknowledged(self.streams, held, ())
            deliveries += (found := self._deliveries(messages))
            held += [f"{each.stream} {each.entry}" for each in found]
        return deliveries

    async def _fetch_unacknowledged(
        self, streams: Sequence[str], known: Sequence[str], locks: Sequence[bytes]
    ) -> tuple[list[Any], int]:
        args = [self.consumer_name, scripts.pack(known), scripts.pack(locks), UNACKNOWLEDGED_BATCH, CALL_BYTES, 0]
        messages, more = await script("fetch_unacknowledged")(self._waiting, streams, args)
        return messages, more

    async def _unknown_locks(self, known: Iterable[LockSpec]) -> list[bytes]:
        held = {scripts.pack(f"{lock['owner']}:{lock['key']}") for lock in known}
        records = self.redis.hscan_iter(keys.HELD_PREFIX + self.consumer_name, count=SCANNED)
        try:
            return [name async for name, kind in records if kind and scripts.pack(name) not in held]
        except ResponseError:  # a key of the wrong type
            return []

    def _call_limit(self, free: int) -> int:
        """Number of messages that one call may reserve, so that as large ones as lately fit into `CALL_BYTES`."""
        return min(free, max(1, CALL_BYTES // self._large_bytes))

    def _deliveries(self, messages: Sequence[Any]) -> list[Delivery]:
        """Parse the flat list that `add_delivery` of lua/_cancel.lua returns."""
        deliveries = []
        each = iter(messages)
        for position, entry, data, times, cancelled in zip(each, each, each, each, each, strict=True):
            stream = self.streams[position - 1]
            if type(data) is bytes:  # the usual case
                delivery = Delivery(stream, entry.decode(), times, data, data)
            else:
                delivery = Delivery.of_fields(stream, entry.decode(), times, data)
            if cancelled:
                delivery.cancelled = True
            deliveries.append(delivery)
        if deliveries:
            self._large_bytes = max(self._large_bytes // 2, *[len(each.raw) for each in deliveries], 1)
        return deliveries

    async def promote(self, *, lines: bool = True) -> int | None:
        """Move due tasks and the children of complete groups into their streams.

        Args:
            lines: also poll locks with waiting tasks that are due.

        Returns:
            Milliseconds until the next call: until the next due time, or until the lease of a leading scheduler,
            which promotes tasks itself, would end. None: nothing is delayed.
        """
        while True:
            next_due, now, leads_ms, more = await self._promote()
            if not more:
                if next_due is None:
                    return None
                if next_due > now or not lines:
                    return max(0, leads_ms + 1 if leads_ms else 0, next_due - now)
                await scripts.lines(self.redis, LINES_BATCH)
            await asyncio.sleep(0)

    async def _promote(self) -> tuple[int | None, int, int, bool]:
        moved, next_due, now, leads_ms, more, unreadable = await scripts.promote(self.redis, PROMOTE_BATCH)
        self.counts.promoted += moved
        self.counts.unparsable += unreadable
        if unreadable:
            logger.error("%d delayed tasks cannot be read: they are dead letters now", unreadable)
        return next_due, now, leads_ms, more

    async def promote_batch(self) -> tuple[bool, int | None]:
        """Promote a batch of due tasks or, if there are none, poll the locks with waiting tasks that are due.

        Returns:
            True if more may be due now; and the next due time (ms since the epoch), None: nothing is delayed.
        """
        next_due, now, _, more = await self._promote()
        if more:
            return True, next_due
        lines_are_due = next_due is not None and next_due <= now
        if lines_are_due:
            await scripts.lines(self.redis, LINES_BATCH)
        return lines_are_due, next_due

    # --- starting and settling --------------------------------------------------------------------------

    async def cancel(
        self, task_ids: Sequence[str], *, result_ttl_seconds: float | None = None
    ) -> dict[str, cancel.TaskPlace]:
        """Cancel tasks in any state. See `diracx.tasks.plumbing.cancellation`.

        Args:
            result_ttl_seconds: store an error as the result of tasks that have not started; by default only of
                those submitted with that label.

        Returns:
            The state in which each task was found.
        """
        await self.promote(lines=False)  # moves children of groups into their streams, where the search finds them
        return await cancel.cancel(self.redis, task_ids, result_ttl_seconds)

    async def start(self, requests: Sequence[StartRequest], *, lease_seconds: float = 0) -> list[StartReply]:
        """Take the locks of each delivery, or park it."""
        # By the connection that waits, unless the next batch is being fetched.
        return await scripts.start(self._waiting, self.consumer_name, requests, int(lease_seconds * 1000))

    async def settle(self, settlements: Sequence[Settlement], dataset_id: str = "") -> list[SettleReply]:
        """Settle deliveries.

        Args:
            dataset_id: see `scripts.settle`.
        """
        replies: list[SettleReply] = []
        for batch in (
            in_calls(settlements, SETTLE_BATCH, Settlement.bytes) if len(settlements) > 1 else [settlements]
        ):
            replies += await scripts.settle(self.redis, self.consumer_name, batch, dataset_id)
        return replies

    async def leave(self) -> bool:
        """Remove this broker's worker from the lists. False: it holds messages, which others will reclaim."""
        return bool(await script("leave")(self.redis, args=[self.consumer_name, EVERY_STREAM]) == 1)
