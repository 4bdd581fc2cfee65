"""The broker: every verb by which a task's state changes, each one atomic step on the server.

    submit → fetch | reclaim → start → settle      promote (delayed → queued)

`docs/explanation/transitions.md` lists each transition with its script.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import msgpack
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import OutOfMemoryError, RedisError, ResponseError

from .._util.passwords import mask
from ..enums import Size
from ..exceptions import DuplicateTaskIdError, SendTaskError
from . import cancel, keys, published, scripts
from .clients import DirectConnection
from .connection import async_client
from .counts import Counts
from .keys import ALL_STREAM_NAMES, stream_name_for
from .labels import stream_of_labels
from .locking import RELEASE_BATCH
from .models import Delivery, Settlement, Submission, TaskMessage, TaskResult, in_ms
from .schema_version import check_version, note_version
from .scripts import EVERY_STREAM, script
from .server_check import Role, UnusableServerError, obstacle, read_server
from .sizes import ALWAYS_TAKEN_BYTES, CALL_BYTES, in_calls
from .spans import submission_spans
from .stored import SCANNED, number_of, text_of

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from .requests import GroupChild, GroupFields, LockSpec, Resubmission, StartRequest
__all__ = ["ALL_STREAM_NAMES", "RedisStreamBroker", "stream_name_for"]

#: Everything that the script may need to know of all streams, size by size.
_STREAMS_BY_SIZE = msgpack.packb([keys.streams_of(size) for size in Size])

logger = logging.getLogger(__name__)

#: Lines of locks that one script call looks at.
LINES_BATCH = 50
#: Tasks promoted by one script call: 1 ms of the server's time, with a million of them.
PROMOTE_BATCH = 100
#: Messages submitted by one script call.
SUBMIT_BATCH = 500
DELAY_BATCH = 100
#: Children of a group in one script call.
GROUP_BATCH = 500
#: So many workers have died with a message that may be what killed them.
_SUSPECT_FROM = 2
#: How often consumers are looked for that are on no list: only a list that was lost has left some.
AUDIT_LEASES = 4
#: The least that a worker may be silent of which not even the length of its lease is known.
_UNKNOWN_LEASE_MS = 30_000
#: Messages that one script call finds again.
RECOVER_BATCH = 100
#: Settlements in one script call.
SETTLE_BATCH = 200
#: How long the server remembers that a dead letter was submitted again: a broken-off attempt may be repeated
#: within this time.
RESUBMITTED_TTL_SECONDS = 30 * 86400


def new_worker_id() -> str:
    """A name for a worker that tells where to find it: `host:pid:random`."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"


def _candidate_from(max_deliveries: int) -> int:
    """Before its last chance at the latest, or a message would be poison for what its neighbour has done."""
    return max(1, min(_SUSPECT_FROM, max_deliveries - 1))


def is_poison_candidate(delivery: Delivery, max_deliveries: int) -> bool:
    """True if it may be what its workers died of, and runs once more all the same."""
    return _candidate_from(max_deliveries) <= delivery.redelivery_count < max_deliveries


class RedisStreamBroker:
    """Messages in the streams of one Redis or Valkey server.

    Args:
        url: `redis://`, `rediss://`, `unix://` or `redis+sentinel://` address: see `address.py`.
        worker_size: the size of the worker that fetches through this broker.
        consumer_name: name of that worker; a unique one by default.
        max_connection_pool_size: connections for commands, at least 2; who needs one more waits for it. What waits
            or listens has up to 3 more. By default what the URL says, else any number.
        connection_kwargs: passed to redis-py.

    Raises:
        AddressError: when the URL cannot be used; a ValueError.
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
        # A submission that was sent and not answered must not be sent again behind the caller's back,
        # hence no retries in the client: what can repeat safely (the worker) does so itself.
        self.redis: Redis = async_client(
            url,
            max_connections=max_connection_pool_size,
            **{"retry": Retry(NoBackoff(), 0), **connection_kwargs},
        )
        self._submitting, self._waiting = DirectConnection(self.redis), DirectConnection(self.redis)
        self._large_bytes = 1
        """About the largest message that came lately."""

    @property
    def reconnects(self) -> int:
        """Number of connections that were lost and opened again: each time, perhaps, to another server."""
        pool: Any = self.redis.connection_pool
        return int(pool.reconnects)

    @property
    def patience_seconds(self) -> float:
        """Time within which the server has to answer before the connection counts as dead."""
        seconds: float | None = self.redis.connection_pool.connection_kwargs.get("socket_timeout")
        return seconds or float("inf")

    async def startup(self, role: Role | None = None) -> None:
        """Check that the server answers, and that the task system can work on it.

        Args:
            role: for which its user must have the rights.

        Raises:
            UnusableServerError: when it cannot.
            redis.exceptions.RedisError: when the server does not answer.
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
        await self.close_spare_connections(0, keep=0)  # it may be long until the next is needed

    async def close_spare_connections(self, unused_seconds: float, keep: int = 1) -> None:
        """Close connections that were opened for many calls at a time and have not been used for so long."""
        from .clients import close_spare

        await close_spare(self.redis, unused_seconds, keep)

    async def shutdown(self) -> None:
        """Close all connections."""
        await self._submitting.close()
        await self._waiting.close()
        await self.redis.aclose()

    # --- submitting -------------------------------------------------------------------------------------

    async def enqueue(self, message: TaskMessage, stream: str | None = None) -> None:
        """Submit one message, by default to the queue of its labels `priority` and `size`: else normal, medium."""
        await self.submit([Submission(message, stream or stream_of_labels(message.labels))])

    async def submit(self, submissions: Sequence[Submission]) -> None:
        """Submit messages: one round trip for each queue and each `SUBMIT_BATCH` of them, and for each
        `DELAY_BATCH` of those that are not due yet.

        Raises:
            SendTaskError: when the server could not be reached or refused.
            DuplicateTaskIdError: when two have one id (nothing is sent then), or one that is not due yet has that
                of another task that waits (nothing of its batch is sent).
            TypeError: when an argument cannot travel; nothing is sent then.
            TaskTooLargeError: when a message is too large; nothing is sent then.
        """
        with submission_spans(submissions):
            await self._submit(submissions)
        self.counts.note_submitted(submissions)

    async def _submit(self, submissions: Sequence[Submission]) -> None:
        packed = [(submission, submission.dumpb()) for submission in submissions]
        _check_ids(submissions)
        try:
            if len(packed) == 1 and packed[0][0].at_time is None:
                submission, data = packed[0]
                await self._add(submission.stream, data)
                return
            now: dict[str, list[bytes]] = {}
            for submission, data in packed:
                if submission.at_time is None:
                    now.setdefault(submission.stream, []).append(data)
            for stream, messages in now.items():
                for portion in in_calls(messages, SUBMIT_BATCH, len):
                    await scripts.submit(self.redis, stream, portion)
            later = [
                (each.message.task_id, in_ms(each.at_time), each.stream, "at_time", data)
                for each, data in packed
                if each.at_time is not None
            ]
            later.sort(key=lambda message: message[1])  # the server tells of each that is earlier than all before
            for delayed in in_calls(later, DELAY_BATCH, lambda message: len(message[-1])):
                taken = await scripts.delay(self.redis, delayed)
                if taken is not None:
                    name = taken.decode(errors="replace")
                    raise DuplicateTaskIdError(
                        f"task id {name!r} belongs to a task that waits: leave it out, or cancel that task first"
                    )
        except RedisError as error:
            names = {submission.message.task_name for submission in submissions}
            largest = max(len(data) for _, data in packed)
            raise SendTaskError(
                f"cannot submit {', '.join(sorted(names))}: {error}{_about_size(largest)}"
            ) from error

    async def _add(self, stream: str, data: bytes) -> None:
        command = ("XADD", stream, "*", "data", data)
        if self._submitting.in_use:
            await self.redis.execute_command(*command)
            return
        [answer] = await self._submitting.execute(command)
        if isinstance(answer, Exception):
            raise answer

    async def submit_group(
        self, group_id: str, children: Sequence[Submission], fields: GroupFields, ttl_seconds: int
    ) -> None:
        """Create a callback group and submit its children: all of them or none.

        However many there are, no step takes the server more than a few ms. The children of a large group
        begin when all of them have arrived; if this process dies before that, none does, and if it dies
        after that, workers go on.

        Raises:
            SendTaskError: when the server could not be reached or refused.
        """
        with submission_spans(children):
            reply = await self._submit_group(group_id, children, fields, ttl_seconds)
        self.counts.note_submitted(children)
        if reply == 2:
            try:
                await self.promote(lines=False)
            except RedisError as error:
                logger.warning("group %s is submitted; workers will move its children: %s", group_id, error)

    async def _submit_group(
        self, group_id: str, children: Sequence[Submission], fields: GroupFields, ttl_seconds: int
    ) -> int:
        _check_ids(children)
        packed: list[GroupChild] = [
            {"task": c.message.task_id, "staged": c.stream.encode() + b"\n" + c.dumpb()} for c in children
        ]
        first_fields: GroupFields | None = {**fields, "ttl_ms": int(ttl_seconds * 1000)}
        reply = 0
        try:
            portions = list(in_calls(packed, GROUP_BATCH, lambda child: len(child["staged"]))) or [[]]
            for position, portion in enumerate(portions, start=1):
                last = position == len(portions)
                reply = await scripts.group(self.redis, group_id, first_fields, portion, last)
                first_fields = None
                if reply < 0:
                    raise SendTaskError(f"cannot submit group {group_id}: the server has lost its beginning")
        except RedisError as error:
            largest = max((len(child["staged"]) for child in packed), default=0)
            raise SendTaskError(f"cannot submit group {group_id}: {error}{_about_size(largest)}") from error
        return reply

    async def resubmit(self, tickets: Sequence[tuple[str, Submission]]) -> list[bool]:
        """Submit dead letters again, each ticket once in `RESUBMITTED_TTL_SECONDS`. Safe to repeat.

        Returns:
            Which were submitted now; the others had been before.

        Raises:
            SendTaskError: when the server could not be reached or refused.
        """
        requests: list[Resubmission] = [
            {"ticket": ticket, "stream": submission.stream, "data": submission.message.dumpb()}
            for ticket, submission in tickets
        ]
        done: list[bool] = []
        try:
            for portion in in_calls(requests, SUBMIT_BATCH, lambda each: len(each["data"])):
                done += await scripts.resubmit(self.redis, portion, RESUBMITTED_TTL_SECONDS * 1000)
        except RedisError as error:
            raise SendTaskError(f"cannot submit {len(requests)} dead letters again: {error}") from error
        self.counts.note_submitted(submission for (_, submission), new in zip(tickets, done, strict=True) if new)
        return done

    # --- fetching ---------------------------------------------------------------------------------------

    async def fetch(
        self, free: int, *, lease_seconds: float = 0, last_ids: Sequence[str] = ()
    ) -> tuple[list[Delivery], list[str]]:
        """Reserve up to `free` messages, most urgent first.

        Args:
            lease_seconds: the lease of the worker, which begins with this call if it has ended before.
            last_ids: of each stream, an id up to which all has been delivered.

        Returns:
            The deliveries, and when there are none the last id of each stream, to wait from.
        """
        args = [self.consumer_name, self._at_once(free), int(lease_seconds * 1000), *last_ids]
        messages, new_ids = await script("fetch")(self._waiting, self.streams, args)
        if messages:
            return self._deliveries(messages), []
        now_last = [text_of(last_id) for last_id in new_ids] or list(last_ids)
        return [], [now or before for now, before in zip(now_last, last_ids or now_last, strict=True)]

    async def reserve_next(
        self, at_most: int, timeout: float, sent: Callable[[int], None] = lambda socket: None
    ) -> tuple[list[Delivery], bool]:
        """Wait for up to `timeout` seconds for messages and reserve up to `at_most` of the stream that has some.

        No other worker is called for them. If several streams have some, it is as many of each, most urgent first.

        Args:
            sent: called with the descriptor of the socket by which the answer comes, before it can be read.

        Returns:
            The deliveries; and whether there are cancelled tasks, so that what was reserved has to be looked at:
            `recover` does.

        Raises:
            redis.exceptions.ResponseError: a stream or group is missing, as after `end_wait`; `fetch` makes them.
        """
        group = ("XREADGROUP", "GROUP", keys.GROUP, self.consumer_name, "COUNT", self._at_once(at_most))
        streams = (*self.streams, keys.WAIT_PREFIX + self.consumer_name)
        wait = (*group, "BLOCK", max(1, int(timeout * 1000)), "STREAMS", *streams, *[">"] * len(streams))
        answers = await self._waiting.execute(wait, ("EXISTS", keys.CANCELLED), sent=sent)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        reply, marks = answers
        messages: list[Any] = []
        for stream, entries in reply or []:
            for entry, fields in entries:
                data = fields[1] if len(fields) == 2 and fields[0] == b"data" else fields
                messages += (self.streams.index(stream.decode()) + 1, entry, data, 1, 0)
        return self._deliveries(messages), bool(marks and messages)

    async def end_wait(self) -> None:
        """End `reserve_next` on the server, which gives us nothing more, nor on a later call before a `fetch`."""
        await self.redis.unlink(keys.WAIT_PREFIX + self.consumer_name)

    async def reclaim(
        self, free: int, *, audit: bool = False, lease_seconds: float = 30.0, max_deliveries: int = 3
    ) -> tuple[list[Delivery], float, bool]:
        """Take over up to `free` messages of dead workers, and take what is new in more urgent queues.

        Args:
            audit: also look for consumers that are on no list, unless another worker has just done so.
            lease_seconds: the caller's lease, as for `fetch`.
            max_deliveries: a message that so many workers have died with will not run again. One that nearly
                as many have died with may be what they died of: such a candidate is given to a worker that holds
                nothing else, so that the guilty one dies alone. Such a worker must not fetch.

        Returns:
            The deliveries; in how many seconds to look again: when the next lease ends, or with the next free slot
            (0) where the slots were too few; and whether the worker is to drain for a candidate: to fetch
            nothing until it holds nothing, and then to look again.
        """
        lease_ms = int(lease_seconds * 1000)
        if audit:
            await check_version(self.redis)
            with suppress(OutOfMemoryError):  # a full server takes no new keys: another time
                await self._audit(lease_ms)
        args = [self.consumer_name, self._at_once(free), _STREAMS_BY_SIZE, lease_ms]
        args += [_candidate_from(max_deliveries), max_deliveries]
        messages, again_ms, make_room = await script("reclaim")(self._waiting, self.streams, args)
        deliveries = self._deliveries(messages)
        self.counts.note_reclaimed(each for each in deliveries if each.deliveries > 1)
        return deliveries, again_ms / 1000, bool(make_room)

    async def _audit(self, lease_ms: int) -> None:
        """Enter consumers that are on no list of workers, as after a loss of data: one worker does it for all.

        Each may be silent for its own lease, if that is still known, or for the longest that is.
        """
        shortest: Any = await self.redis.zrange(keys.LEASES, 0, 0, withscores=True)
        kept_ms = (AUDIT_LEASES - 1) * min(lease_ms, *(length for _, length in shortest), math.inf)
        # Over when the worker with the shortest lease comes again.
        if not await self.redis.set(keys.AUDITOR, self.consumer_name, nx=True, px=max(1, int(kept_ms))):
            return
        sizes = [keys.streams_of(size) for size in Size]  # a worker makes all streams of its own
        streams = [stream for size in sizes if await self.redis.exists(*size) for stream in size]
        async with self.redis.pipeline(transaction=False) as pipe:
            pipe.time()
            pipe.zrange(keys.LEASES, -1, -1, withscores=True)
            for stream in streams:
                pipe.xinfo_consumers(stream, keys.GROUP)
            (seconds, microseconds), longest, *found = await pipe.execute(raise_on_error=False)
            now_ms = seconds * 1000 + microseconds // 1000
            unknown_ms = max(_UNKNOWN_LEASE_MS, lease_ms, *(length for _, length in longest))
            # No stream, or nobody has ever asked for what is in it: an error.
            known = [consumers for consumers in found if not isinstance(consumers, ResponseError)]
            await published.look_after(self.redis, known, now_ms)
            names = list({consumer["name"] for consumers in known for consumer in consumers})
            for first in range(0, len(names), SCANNED):
                some = names[first : first + SCANNED]
                lengths = zip(some, await self.redis.zmscore(keys.LEASES, some), strict=True)
                ends_ms = {name: int(now_ms + (length or unknown_ms)) for name, length in lengths}
                await self.redis.zadd(keys.ALIVE, ends_ms, nx=True)
            # Workers that an earlier release took for dead: it knows nothing of these keys.
            if gone := await self.redis.zdiff([keys.LEASES, keys.ALIVE]):
                await self.redis.zrem(keys.LEASES, *gone)

    async def recover(
        self, known: Iterable[tuple[str, str]], locks: Iterable[LockSpec] | None = None
    ) -> list[Delivery]:
        """Deliveries that were reserved for us in a call whose answer was lost.

        Args:
            known: stream and entry of what is in our hands.
            locks: those that are in our hands; any other that the server takes for ours is given back.
        """
        held = [f"{stream} {entry}" for stream, entry in known]
        unknown = [] if locks is None else await self._unknown_locks(locks)
        for part in in_calls(unknown, RELEASE_BATCH, lambda _: 0):
            await self._recover((), (), part)
        deliveries: list[Delivery] = []
        more = 1
        while more:
            messages, more = await self._recover(self.streams, held, ())
            deliveries += (found := self._deliveries(messages))
            held += [f"{each.stream} {each.entry}" for each in found]
        return deliveries

    async def _recover(
        self, streams: Sequence[str], known: Sequence[str], locks: Sequence[bytes]
    ) -> tuple[list[Any], int]:
        args = [self.consumer_name, scripts.pack(known), scripts.pack(locks), RECOVER_BATCH, CALL_BYTES, 0]
        messages, more = await script("recover")(self._waiting, streams, args)
        return messages, more

    async def _unknown_locks(self, known: Iterable[LockSpec]) -> list[bytes]:
        ours = {scripts.pack(f"{lock['owner']}:{lock['key']}") for lock in known}
        noted = self.redis.hscan_iter(keys.HELD_PREFIX + self.consumer_name, count=SCANNED)
        try:
            return [line async for line, kind in noted if kind and scripts.pack(line) not in ours]
        except ResponseError:  # a key of another type is no record of ours
            return []

    def _at_once(self, free: int) -> int:
        """Messages that one call may reserve: the next ones may be as large as the last ones."""
        return min(free, max(1, CALL_BYTES // self._large_bytes))

    def _deliveries(self, messages: Sequence[Any]) -> list[Delivery]:
        """From the flat list of lua/_cancel.lua's `hand_out`."""
        deliveries = []
        each = iter(messages)
        for position, entry, data, times, cancelled in zip(each, each, each, each, each, strict=True):
            stream = self.streams[position - 1]
            if type(data) is bytes:  # nearly always
                delivery = Delivery(stream, entry.decode(), times, data, data)
            else:
                delivery = _with_fields(stream, entry.decode(), times, data)
            if cancelled:
                delivery.cancelled = True
            deliveries.append(delivery)
        if deliveries:
            self._large_bytes = max(self._large_bytes // 2, *(len(each.raw) for each in deliveries), 1)
        return deliveries

    async def promote(self, *, lines: bool = True) -> int | None:
        """Move everything that is due into its stream, and the children of complete groups.

        Args:
            lines: whether to look also at the lines of locks that are due.

        Returns:
            In how many milliseconds to look again: when the next one is due, and not before the lead of a
            scheduler would end, which sees to it. None: nothing is delayed.
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
        """Move a batch of what is due, or look at lines of locks that are due.

        Returns:
            Whether more may be due now; and when the next is (ms since the epoch), None: nothing is delayed.
        """
        next_due, now, _, more = await self._promote()
        if more:
            return True, next_due
        lines_are_due = next_due is not None and next_due <= now
        if lines_are_due:
            await scripts.lines(self.redis, LINES_BATCH)
        return lines_are_due, next_due

    # --- running and ending -----------------------------------------------------------------------------

    async def cancel(
        self, task_ids: Sequence[str], *, result_ttl_seconds: float | None = None
    ) -> dict[str, cancel.TaskPlace]:
        """Cancel tasks, wherever they are. See `diracx.tasks.plumbing.cancellation`.

        Args:
            result_ttl_seconds: keep an error as result of those that had not begun; by default only where
                the task was submitted with that label.

        Returns:
            Where each was found.
        """
        await self.promote(lines=False)  # the children of a group may be between two places
        return await cancel.cancel(self.redis, task_ids, result_ttl_seconds)

    async def start(
        self, requests: Sequence[StartRequest], *, lease_seconds: float = 0
    ) -> tuple[list[list[int]], int]:
        """Take the locks of each delivery or park it.

        Returns:
            The replies of lua/start.lua, and the fencing token of the first: each of the others has the next one.
        """
        args = [self.consumer_name, scripts.pack(requests), int(lease_seconds * 1000)]
        *replies, token = await script("start")(self.redis, args=args)
        return [[int(number) for number in reply] for reply in replies], int(token)

    async def settle(self, settlements: Sequence[Settlement], dataset_id: str = "") -> list[bool | str | None]:
        """End deliveries.

        Args:
            dataset_id: see `scripts.settle`.

        Returns:
            Which settlements were accepted. False: it had been taken over; None: the server has lost its data;
            a text: what of it the server has refused.
        """
        accepted: list[bool | str | None] = []
        for batch in (
            in_calls(settlements, SETTLE_BATCH, Settlement.bytes) if len(settlements) > 1 else [settlements]
        ):
            accepted += await scripts.settle(self.redis, self.consumer_name, batch, dataset_id)
        return accepted

    async def leave(self) -> bool:
        """Take this broker's worker off every list. False: it holds messages, which others will reclaim."""
        return bool(await script("leave")(self.redis, args=[self.consumer_name, EVERY_STREAM]) == 1)

    # --- results ----------------------------------------------------------------------------------------

    async def is_result_ready(self, task_id: str) -> bool:
        """True if a result is stored under this id."""
        return bool(await self.redis.exists(keys.RESULT_PREFIX + task_id))

    async def get_result(self, task_id: str) -> TaskResult[Any]:
        """The stored result of a task.

        Raises:
            ResultIsMissingError: when there is none (yet, or any more).
        """
        data: Any = await self.redis.get(keys.RESULT_PREFIX + task_id)
        return TaskResult.loadb(data)

    async def wait_result(self, task_id: str, timeout: float | None = None) -> TaskResult[Any]:
        """Wait until the result of a task is there.

        The worker announces it on a channel of the same name; a look now and then covers a lost message.

        Raises:
            TimeoutError: after `timeout` seconds.
        """
        key = keys.RESULT_PREFIX + task_id
        async with asyncio.timeout(timeout), self.redis.pubsub() as pubsub:
            await pubsub.subscribe(key)
            while True:
                data: Any = await self.redis.get(key)
                if data is not None:
                    return TaskResult.loadb(data)
                while True:
                    message = await pubsub.get_message(timeout=1.0)
                    if message is None or message["type"] == "message":
                        break


def _check_ids(submissions: Sequence[Submission]) -> None:
    """Raises `DuplicateTaskIdError` when two of them have the same id."""
    ids = [submission.message.task_id for submission in submissions]
    if len(set(ids)) < len(ids):
        [(twice, _)] = Counter(ids).most_common(1)
        raise DuplicateTaskIdError(f"two tasks have the id {twice!r}: nothing is submitted; leave the ids out")


def _with_fields(stream: str, entry: str, times: int, fields: Sequence[bytes]) -> Delivery:
    values = dict(zip(fields[::2], fields[1::2], strict=False))
    data = values.get(b"data")
    return Delivery(
        stream,
        entry,
        times,
        data,
        raw=data if data is not None else msgpack.packb(fields),
        since=str(number_of(values.get(b"since"))),
        earlier_redeliveries=number_of(values.get(b"deaths")),
        survived=number_of(values.get(b"survived")),
        occurrence=text_of(values[b"occurrence"]) if b"occurrence" in values else None,
        granted=values.get(b"woken"),
    )


def _about_size(largest: int) -> str:
    """Hint at the size of a large message, where the server does not say it: it closes the connection."""
    if largest < ALWAYS_TAKEN_BYTES:
        return ""
    return f" (the largest message has {largest} bytes; the server's proto-max-bulk-len is its limit)"
