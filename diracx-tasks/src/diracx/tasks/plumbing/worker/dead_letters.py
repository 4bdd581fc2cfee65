"""Stores dead letters before the broker is told: in SQL, in batches, or in Redis while there is no database."""

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

from .._util.retrying import Backoff, is_transient, retry_until_available
from ..broker.dead_letter_stream import DEAD_LETTERS, dead_letters, delete_dead_letters
from ..broker.groups import ask_for_audit, group_of
from ..broker.models import id_at_head
from ..broker.sizes import CALL_BYTES, in_calls
from ..messages.error_info import one_line
from ..persistence.dead_letter import DeadLetter
from .keeper import PendingAck

if TYPE_CHECKING:
    from ..broker import RedisStreamBroker
    from ..broker.models import Settlement
    from ..broker.requests import StoredDeadLetter
    from ..persistence import TaskDB
    from .keeper import LeaseKeeper
    from .settler import Settler

logger = logging.getLogger(__name__)

#: Dead letters in one transaction. What is larger than `CALL_BYTES` together is parted.
_BATCH = 100
#: How many wait in memory for the database, with their tasks unacknowledged and their locks held; and how long.
_MAX_QUEUED = 1_000
_MAX_QUEUED_BYTES = 16 * 1024 * 1024
_MAX_SECONDS = 30.0
#: A database that is cut off says nothing at all; then a new connection must be tried some time.
_ANSWER_SECONDS = 10.0
#: So often the database refuses a dead letter, or closes the connection on it and answers others, to be believed.
_REFUSALS = 3
#: How often to look for dead letters in Redis, and how often to try again those that the database has refused.
_IMPORT_SECONDS = 60.0
_RETRY_REFUSED_SECONDS = 3600.0
#: No other worker imports for so long after the last batch was read: longer than a batch may take.
_IMPORT_LEASE_MS = 15_000
#: How long a worker that starts waits for the first import.
_START_SECONDS = 2.0


class _RefusedError(Exception):
    """The database takes other statements, and not this dead letter."""


class _Queued(NamedTuple):
    dead_letter: DeadLetter
    settlement: Settlement
    since: float  # time.monotonic()


def in_redis(dead_letter: DeadLetter) -> StoredDeadLetter:
    """The dead letter as settle.lua keeps it until a worker imports it into the database."""
    return {"reason": dead_letter.reason, "data": dead_letter.dumpb()}


class DeadLetterStore:
    """Stores the dead letters of one worker, and imports those that wait in Redis.

    While the database is away, one loop tries again, with one statement at a time. The queue in memory is bounded
    by number, bytes and age: what is beyond goes to Redis in the same step that acknowledges its task.

    Args:
        settler: sends the settlement of a task whose dead letter is stored, or goes with it.
        keeper: keeps the task leased until then.
    """

    def __init__(
        self, broker: RedisStreamBroker, db: TaskDB | None, settler: Settler, keeper: LeaseKeeper
    ) -> None:
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
        self._failing_since: float | None = None
        self._diverting = False
        self._batch = _BATCH
        self._refusals = 0
        self._after = "-"
        self._began_at = self._import_at = time.monotonic()
        self._caught_up = asyncio.Event()
        self._imported = 0
        self._last_error = ""

    def add(self, dead_letter: DeadLetter, settlement: Settlement) -> None:
        """Store the dead letter, then settle its task."""
        self._keeper.add([PendingAck(settlement.delivery, settlement.locks)])
        if dead_letter.task_name:
            self._enqueue(dead_letter, settlement)
            return
        search = asyncio.create_task(self._add_child(dead_letter, settlement))
        self._searches.add(search)
        search.add_done_callback(self._searches.discard)

    async def _add_child(self, dead_letter: DeadLetter, settlement: Settlement) -> None:
        """Store the dead letter of what cannot be read, and may be the child of a group."""
        child = id_at_head(dead_letter.data)
        redis = self._broker.redis
        find = partial(group_of, redis, child) if child else partial(ask_for_audit, redis)
        group: str | None = None
        try:
            group = await retry_until_available(find, "find the group of a child")
        except ResponseError as error:  # as of a key of another type: the dead letter must not wait for it
            logger.error("cannot look for the group of %r: %s", child, error)
        if group is not None and child is not None:
            told = f"{dead_letter.reason}: {dead_letter.detail}"
            settlement.group = {"id": group, "child": child, "error": told.replace("\n", " ")}
        self._enqueue(dead_letter, settlement)

    def _enqueue(self, dead_letter: DeadLetter, settlement: Settlement) -> None:
        queued = _Queued(dead_letter, settlement, time.monotonic())
        if self._closed:
            self._send_to_redis(queued)
        elif self._is_full(len(dead_letter.data)) or self._away_for_long():
            self._divert(queued)
        else:
            self._queue.append(queued)
            self._queued_bytes += len(dead_letter.data)
            self._arrived.set()
            self._idle.clear()

    def _is_full(self, more_bytes: int) -> bool:
        too_large = self._queued_bytes + more_bytes > _MAX_QUEUED_BYTES
        return len(self._queue) >= _MAX_QUEUED or (too_large and bool(self._queue))

    def _away_for_long(self) -> bool:
        return self._failing_since is not None and time.monotonic() - self._failing_since > _MAX_SECONDS

    async def run(self) -> None:
        """Store what comes, and import what waits in Redis, for ever."""
        pauses = Backoff()
        while self._db is not None:
            await self._work()
            began_at = time.monotonic()
            try:
                if self._failing_since is not None:
                    await self._probe()
                await (self._store_next() if self._queue else self._import_next())
            except Exception as error:
                if self._failing_since is None:
                    self._failing_since = began_at
                    logger.warning("cannot store a dead letter: %s; trying again until it works", _in_short(error))
                self._caught_up.set()
                self._idle.set()
                self._divert_old()
                await asyncio.sleep(pauses.next())
            else:
                if self._failing_since is not None:
                    logger.warning("can store a dead letter again")
                self._failing_since = None
                if self._diverting and not self._queue:
                    self._diverting, self._import_at = False, began_at
                self._divert_old()
                pauses.succeeded()

    async def started(self) -> None:
        """Return when what waited in Redis is imported, or that takes longer than a start should."""
        if self._db is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._caught_up.wait(), _START_SECONDS)

    async def close(self, seconds: float) -> None:
        """Let a database that answers store what is queued, within that time. All else goes to Redis.

        Cancelling this ends what cannot be done in time.
        """
        try:
            while self._searches:
                await asyncio.wait(self._searches)
        finally:
            for search in self._searches:
                search.cancel()
        if self._failing_since is None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), seconds)
        self._closed = True
        while self._queue:
            self._send_to_redis(self._pop())

    async def _work(self) -> None:
        """Return when there is something to do."""
        self._arrived.clear()
        if self._queue or self._failing_since is not None:
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
            finish = self._send_to_redis
        else:
            finish = self._settle_stored
        for queued in batch:
            if self._queue and self._queue[0] is queued:  # else it went to Redis meanwhile, for we stop
                finish(self._pop())

    def _pop(self) -> _Queued:
        queued = self._queue.popleft()
        self._queued_bytes -= len(queued.dead_letter.data)
        return queued

    def _settle_stored(self, queued: _Queued) -> None:
        self._settler.add(queued.settlement)

    def _divert_old(self) -> None:
        while self._queue and time.monotonic() - self._queue[0].since > _MAX_SECONDS:
            self._divert(self._pop())

    def _divert(self, queued: _Queued) -> None:
        if not self._diverting:
            self._diverting = True
            logger.warning(
                "the database does not take dead letters as fast as they come: what is more than %d, %d bytes or "
                "%g s waits in Redis, and `dlq waiting` shows it",
                *(_MAX_QUEUED, _MAX_QUEUED_BYTES, _MAX_SECONDS),
            )
        self._send_to_redis(queued)

    def _send_to_redis(self, queued: _Queued) -> None:
        queued.settlement.dead = in_redis(queued.dead_letter)
        self._settler.add(queued.settlement)

    # --- what waits in Redis ----------------------------------------------------------------------------

    async def _import_next(self) -> None:
        now = time.monotonic()
        if now - self._began_at > _RETRY_REFUSED_SECONDS:
            self._after, self._began_at = "-", now
        if await self._import_batch():
            return
        if self._imported:
            logger.info("took %d dead letters from Redis into the database", self._imported)
        self._imported = 0
        self._import_at = now + _IMPORT_SECONDS
        self._caught_up.set()

    async def _import_batch(self) -> bool:
        """True if there was something to import."""
        try:
            entries = await dead_letters(
                self._broker.redis,
                self._broker.consumer_name,
                self._after,
                lease_ms=_IMPORT_LEASE_MS,
                at_most=self._batch,
                at_most_bytes=CALL_BYTES,
            )
        except Exception as error:  # also of a key of another type: an operator may mend that
            self._complain(error)
            return False
        found = {entry: dead_letter for entry, fields in entries if (dead_letter := _readable(entry, fields))}
        try:
            if found and not await self._stored(list(found.values())):
                return True
        except _RefusedError as error:
            logger.error("the dead letter %s stays in Redis: %s", *found, error)
            found = {}
        if entries:
            # Those that stay, because they cannot be read or are refused, are passed over from now on.
            self._after = f"({entries[-1][0]}"
        if found:
            try:
                await delete_dead_letters(self._broker.redis, list(found))
            except Exception as error:
                self._complain(error)
                self._after = "-"  # importing them again changes nothing
            else:
                self._imported += len(found)
        return bool(entries)

    def _complain(self, error: Exception) -> None:
        line = "" if is_transient(error) else one_line(error)  # that Redis is away, others say
        if line and line != self._last_error:
            logger.error("the dead letters in Redis (%s) cannot be read: %s", DEAD_LETTERS, line)
        self._last_error = line

    # --- the database -----------------------------------------------------------------------------------

    async def _stored(self, batch: Sequence[DeadLetter]) -> bool:
        """Store these in one transaction. False: there is one among them to be found, by fewer at a time.

        Raises:
            _RefusedError: the database refuses this only one.
            Exception: the database is away, or to be mended by an operator.
        """
        assert self._db is not None
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
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
        """True if the database refuses what it was sent, and is not away.

        Servers close the connection on what is larger than a packet: then it counts if they answer others.
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
        """Raises: when the database does not answer."""
        assert self._db is not None
        async with asyncio.timeout(_ANSWER_SECONDS):
            await self._db.find("")


def _readable(entry: str, fields: dict[bytes, bytes]) -> DeadLetter | None:
    try:
        return DeadLetter.of_entry(entry, fields)
    except Exception as error:
        logger.error("the dead letter %s stays in Redis: %s", entry, one_line(error))
        return None


def _in_short(error: BaseException) -> str:
    """Without the statement and its parameters, of which some are secret."""
    from ..sql.errors import DatabaseError  # only where there is a database is SQLAlchemy worth its import

    words = getattr(error, "orig", None) or (error.detail if isinstance(error, DatabaseError) else error)
    return f"{type(error).__name__}: {' '.join(str(words).split())[:300]}"
