"""Stores dead letters before their tasks are settled: in SQL, in batches, or in Redis without a database."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from redis.exceptions import ResponseError

from .._util.retrying import Outage, is_transient, retry_until_available
from ..broker.dead_letter_stream import DEAD_LETTERS, dead_letters, delete_dead_letters
from ..broker.groups import group_of, request_audit
from ..broker.models import id_at_head
from ..broker.sizes import CALL_BYTES, in_calls
from ..messages.error_info import one_line
from ..persistence.dead_letter import DeadLetter
from .keeper import PendingAck

if TYPE_CHECKING:
    from ..broker import RedisStreamBroker
    from ..broker.models import Settlement
    from ..persistence import TaskDB
    from .keeper import LeaseKeeper
    from .settings import WorkerSettings
    from .settler import Settler

logger = logging.getLogger(__name__)

#: Dead letters in one transaction; a batch larger than `CALL_BYTES` is split.
_BATCH = 100
#: Bound of the queue in memory, beside the number and age in the settings.
_MAX_QUEUED_BYTES = 16 * 1024 * 1024
#: Attempts before a dead letter counts as refused by the database (an error, or a closed connection while other
#: statements succeed).
_REFUSALS = 3
#: Interval between retries of dead letters that the database has refused.
_RETRY_REFUSED_SECONDS = 3600.0
#: Lease on the import after each batch read, against other workers: longer than a batch may take.
_IMPORT_LEASE_MS = 15_000
#: How long a starting worker waits for the first import.
_START_SECONDS = 2.0


class _RefusedError(Exception):
    """The database refuses this dead letter, while other statements succeed."""


class _Queued(NamedTuple):
    dead_letter: DeadLetter
    settlement: Settlement
    since: float  # time.monotonic()


class DeadLetterStore:
    """Stores the dead letters of one worker in the database, and imports pending ones from Redis.

    While the database is unavailable, one loop retries, with one statement at a time. The queue in memory is
    bounded by number, bytes and age: an excess dead letter goes to Redis in the step that acknowledges its task.

    Args:
        settler: sends the settlement of a task once its dead letter is stored, or with the dead letter inside.
        keeper: keeps the task leased until then.
    """

    def __init__(
        self,
        broker: RedisStreamBroker,
        settings: WorkerSettings,
        db: TaskDB | None,
        settler: Settler,
        keeper: LeaseKeeper,
    ) -> None:
        self._settings = settings
        self._broker = broker
        self._db = db
        self._settler = settler
        self._keeper = keeper
        self._searches: set[asyncio.Task[None]] = set()
        self._queue: deque[_Queued] = deque()
        self._queued_bytes = 0
        self._arrived = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = db is None
        self._outage = Outage("store a dead letter", logger)
        self._diverting = False
        self._batch = _BATCH
        self._refusals = 0
        self._after = "-"
        self._began_at = self._import_at = time.monotonic()
        self.caught_up = asyncio.Event()
        """Is set after the first import from Redis, or when the database fails."""
        self._imported = 0
        self._last_error = ""

    def add(self, settlement: Settlement) -> None:
        """Store the dead letter that is in the settlement, then settle its task."""
        self._keeper.add([PendingAck(settlement.delivery, settlement.locks)])
        assert settlement.dead is not None
        dead_letter = DeadLetter.of_stored(settlement.dead)
        if dead_letter.task_name:
            self._enqueue(dead_letter, settlement)
            return
        search = asyncio.create_task(self._add_child(dead_letter, settlement))
        self._searches.add(search)
        search.add_done_callback(self._searches.discard)

    async def _add_child(self, dead_letter: DeadLetter, settlement: Settlement) -> None:
        """Store the dead letter of an unreadable message, which may be the child of a group."""
        child = id_at_head(dead_letter.data)
        redis = self._broker.redis
        find = partial(group_of, redis, child) if child else partial(request_audit, redis)
        group: str | None = None
        try:
            group = await retry_until_available(find, "find the group of a child")
        except ResponseError as error:  # a key of the wrong type, say: the dead letter must not wait for it
            logger.error("cannot look for the group of %r: %s", child, error)
        if group is not None and child is not None:
            text = f"{dead_letter.reason}: {dead_letter.detail}"
            settlement.group = {"id": group, "child": child, "error": text.replace("\n", " ")}
        self._enqueue(dead_letter, settlement)

    def _enqueue(self, dead_letter: DeadLetter, settlement: Settlement) -> None:
        queued = _Queued(dead_letter, settlement, time.monotonic())
        if self._closed:
            self._settler.add(settlement)
        elif self._is_full(len(dead_letter.data)) or self._unavailable_for_long():
            self._divert(queued)
        else:
            self._queue.append(queued)
            self._queued_bytes += len(dead_letter.data)
            self._arrived.set()
            self._idle.clear()

    def _is_full(self, more_bytes: int) -> bool:
        too_large = self._queued_bytes + more_bytes > _MAX_QUEUED_BYTES
        return len(self._queue) >= self._settings.max_queued_dead_letters or (too_large and bool(self._queue))

    def _unavailable_for_long(self) -> bool:
        since = self._outage.since
        return since is not None and time.monotonic() - since > self._settings.dead_letter_seconds

    async def run(self) -> None:
        """Store queued dead letters and import those in Redis, until cancelled."""
        while self._db is not None:
            await self._wait_for_work()
            began_at = time.monotonic()
            try:
                if self._outage.since is not None:
                    await self._probe()
                await (self._store_next() if self._queue else self._import_next())
            except Exception as error:
                pause = self._outage.failed(_in_short(error), began_at)
                self.caught_up.set()
                self._idle.set()
                self._divert_old()
                await asyncio.sleep(pause)
            else:
                self._outage.over()
                if self._diverting and not self._queue:
                    self._diverting, self._import_at = False, began_at
                self._divert_old()

    async def started(self) -> None:
        """Wait for the first import from Redis, for at most `_START_SECONDS`."""
        if self._db is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.caught_up.wait(), _START_SECONDS)

    async def close(self, seconds: float) -> None:
        """Give a working database `seconds` to store the queue, then send the rest to Redis.

        Cancelling this ends the searches for groups that are not done in time.
        """
        try:
            while self._searches:
                await asyncio.wait(self._searches)
        finally:
            for search in self._searches:
                search.cancel()
        if self._outage.since is None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), seconds)
        self._closed = True
        while self._queue:
            self._settler.add(self._pop().settlement)

    async def _wait_for_work(self) -> None:
        """Return when a dead letter is queued, the next import is due, or the database is to be tried again."""
        self._arrived.clear()
        if self._queue or self._outage.since is not None:
            return
        self._idle.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, self._import_at - time.monotonic())):
                await self._arrived.wait()

    # --- the queue --------------------------------------------------------------------------------------

    async def _store_next(self) -> None:
        batch = next(in_calls(self._queue, self._batch, lambda queued: len(queued.dead_letter.data)))
        try:
            if not await self._stored([queued.dead_letter for queued in batch]):
                return
        except _RefusedError as error:
            dead_letter = batch[0].dead_letter
            logger.error(
                "the database refuses the dead letter of task %s (%d bytes): it waits in Redis, and `dlq "
                "waiting` shows it: %s",
                dead_letter.task_id,
                len(dead_letter.data),
                error,
            )
        else:
            for queued in batch:
                queued.settlement.dead = None
        for queued in batch:
            if self._queue and self._queue[0] is queued:  # else `close` has sent it to Redis meanwhile
                self._settler.add(self._pop().settlement)

    def _pop(self) -> _Queued:
        queued = self._queue.popleft()
        self._queued_bytes -= len(queued.dead_letter.data)
        return queued

    def _divert_old(self) -> None:
        while self._queue and time.monotonic() - self._queue[0].since > self._settings.dead_letter_seconds:
            self._divert(self._pop())

    def _divert(self, queued: _Queued) -> None:
        if not self._diverting:
            self._diverting = True
            logger.warning(
                "the database does not take dead letters as fast as they come: what is more than %d, %d bytes or "
                "%g s waits in Redis, and `dlq waiting` shows it",
                *(self._settings.max_queued_dead_letters, _MAX_QUEUED_BYTES, self._settings.dead_letter_seconds),
            )
        self._settler.add(queued.settlement)

    # --- import from Redis ------------------------------------------------------------------------------

    async def _import_next(self) -> None:
        now = time.monotonic()
        if now - self._began_at > _RETRY_REFUSED_SECONDS:
            self._after, self._began_at = "-", now
        if await self._import_batch():
            return
        if self._imported:
            logger.info("took %d dead letters from Redis into the database", self._imported)
        self._imported = 0
        self._import_at = now + self._settings.import_seconds
        self.caught_up.set()

    async def _import_batch(self) -> bool:
        """Import one batch; True if Redis had any entries."""
        try:
            entries = await dead_letters(
                self._broker.redis,
                self._broker.consumer_name,
                self._after,
                lease_ms=_IMPORT_LEASE_MS,
                at_most=self._batch,
                at_most_bytes=CALL_BYTES,
            )
        except Exception as error:  # also a key of the wrong type, which an operator may repair
            self._log_error(error)
            return False
        found = {entry: dead_letter for entry, fields in entries if (dead_letter := _readable(entry, fields))}
        try:
            if found and not await self._stored(list(found.values())):
                return True
        except _RefusedError as error:
            logger.error("the dead letter %s stays in Redis: %s", *found, error)
            found = {}
        if entries:
            # Unreadable and refused entries stay in Redis, and are skipped from now on.
            self._after = f"({entries[-1][0]}"
        if found:
            try:
                await delete_dead_letters(self._broker.redis, list(found))
            except Exception as error:
                self._log_error(error)
                self._after = "-"  # importing them again changes nothing
            else:
                self._imported += len(found)
        return bool(entries)

    def _log_error(self, error: Exception) -> None:
        line = "" if is_transient(error) else one_line(error)  # an unavailable Redis is logged elsewhere
        if line and line != self._last_error:
            logger.error("the dead letters in Redis (%s) cannot be read: %s", DEAD_LETTERS, line)
        self._last_error = line

    # --- the database -----------------------------------------------------------------------------------

    async def _stored(self, batch: Sequence[DeadLetter]) -> bool:
        """Store a batch in one transaction. False: it was refused, and is to be tried again in smaller batches.

        Raises:
            _RefusedError: the database refuses the only dead letter of the batch.
            Exception: the database is unavailable, or needs an operator.
        """
        assert self._db is not None
        try:
            async with asyncio.timeout(self._settings.database_answer_seconds):
                await self._db.insert_all(batch)
        except Exception as error:
            if not await self._is_refusal(error):
                raise
            if len(batch) > 1:
                self._batch = len(batch) // 2
                return False
            self._refusals += 1
            if self._refusals < _REFUSALS:
                return False
            self._refusals = 0
            raise _RefusedError(_in_short(error)) from error
        self._batch, self._refusals = min(2 * self._batch, _BATCH), 0
        return True

    async def _is_refusal(self, error: Exception) -> bool:
        """True if the database refuses the statement, rather than being unavailable.

        Servers close the connection on a statement larger than a packet: a refusal if another statement succeeds.
        """
        from ..sql.errors import ErrorKind, classify, is_cut_off

        if classify(error) in (ErrorKind.REFUSED, None):
            return True
        if is_cut_off(error):
            with suppress(Exception):
                await self._probe()
                return True
        return False

    async def _probe(self) -> None:
        """Raise an error unless the database responds."""
        assert self._db is not None
        async with asyncio.timeout(self._settings.database_answer_seconds):
            await self._db.find("")


def _readable(entry: str, fields: dict[bytes, bytes]) -> DeadLetter | None:
    try:
        return DeadLetter.of_entry(entry, fields)
    except Exception as error:
        logger.error("the dead letter %s stays in Redis: %s", entry, one_line(error))
        return None


def _in_short(error: BaseException) -> str:
    """Format the error without the statement and its parameters, which may be secret."""
    from ..sql.errors import DatabaseError  # imports SQLAlchemy, which a worker without a database does without

    message = getattr(error, "orig", None) or (error.detail if isinstance(error, DatabaseError) else error)
    return f"{type(error).__name__}: {' '.join(str(message).split())[:300]}"
