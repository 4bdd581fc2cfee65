"""Where dead letters go: into SQL before the broker is told, or into a stream until there is a database."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from redis.exceptions import WatchError

from ..broker import keys
from ..patience import patiently
from ..persistence.letter import DeadLetter
from ..wire import dumps

if TYPE_CHECKING:
    from ..broker import RedisStreamBroker
    from ..broker.models import Settlement
    from ..persistence import TaskDB

logger = logging.getLogger(__name__)

_BATCH = 100
_ANSWER_SECONDS = 10.0


#: So often the database refuses a letter, or closes the connection on it and answers others, until it is believed.
_REFUSALS = 3


class _RefusedError(Exception):
    """The database takes other statements, and not this letter."""


def in_redis(letter: DeadLetter) -> dict[str, Any]:
    """The letter as settle.lua keeps it until a worker with a database starts."""
    return {"reason": letter.reason, "data": dumps(asdict(letter))}


class DeadLetterOffice:
    """Takes dead letters of one worker."""

    def __init__(self, broker: RedisStreamBroker, db: TaskDB | None) -> None:
        self._broker = broker
        self._db = db

    async def bury(self, letter: DeadLetter, settlement: Settlement) -> Settlement:
        """Store the letter for good; return the settlement that may be sent after that.

        As long as the database is away, or is to be mended by an operator, the task stays unacknowledged in this
        worker's hands. A letter that the database refuses (it is too large, say) waits in Redis.
        """
        if self._db is not None:
            attempt = partial(self._store, letter, [])
            try:
                await patiently(attempt, "store a dead letter", passing=_concerns_database)
                return settlement
            except Exception as error:
                logger.error(
                    "the database refuses the dead letter of task %s (%d bytes): it waits in Redis, and `dlq "
                    "waiting` shows it: %s",
                    letter.task_id,
                    len(letter.data),
                    _in_short(error),
                )
        settlement.dead = in_redis(letter)
        return settlement

    async def _store(self, letter: DeadLetter, refusals: list[Exception]) -> None:
        try:
            await self._insert(letter)
        except Exception as error:
            if not await self._is_refusal(error):
                raise
            refusals.append(error)
            if len(refusals) == _REFUSALS:
                raise _RefusedError(_in_short(error)) from error
            raise

    async def adopt(self) -> int:
        """Move letters that waited for a database into ours. Returns how many."""
        moved, after = 0, "-"
        while self._db is not None:
            entries: Any = await self._broker.redis.xrange(keys.DEAD_LETTERS, min=after, count=_BATCH)
            for entry, fields in entries:
                after = f"({entry.decode()}"
                try:
                    await self._insert(DeadLetter.of_entry(entry.decode(), fields))
                except Exception as error:
                    logger.error("the dead letter %s stays in Redis: %s", entry.decode(), _in_short(error))
                    if not _concerns_database(error) or await self._is_refusal(error):
                        continue
                    entries = []  # the others would not fare better
                    break
                await self._broker.redis.execute_command("XDEL", keys.DEAD_LETTERS, entry)
                moved += 1
            if not entries:
                break
        if moved:
            await self._forget_empty_stream()
            logger.info("took %d dead letters from Redis into the database", moved)
        return moved

    async def _is_refusal(self, error: Exception) -> bool:
        """Whether the database refuses what it was sent, and is not away.

        Servers close the connection on what is larger than a packet: then it counts if they answer others.
        """
        from ..sql.errors import Trouble, classify, is_cut_off

        return classify(error) is Trouble.REFUSED or (is_cut_off(error) and await self._answers())

    async def _answers(self) -> bool:
        assert self._db is not None
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                await self._db.find("")
        except Exception:
            return False
        return True

    async def _forget_empty_stream(self) -> None:
        """Delete the stream unless a worker without a database has put something there meanwhile."""
        async with self._broker.redis.pipeline(transaction=True) as pipe:
            await pipe.watch(keys.DEAD_LETTERS)
            if await pipe.xlen(keys.DEAD_LETTERS) == 0:
                pipe.multi()
                pipe.delete(keys.DEAD_LETTERS)
                with suppress(WatchError):
                    await pipe.execute()

    async def _insert(self, letter: DeadLetter) -> None:
        assert self._db is not None
        # A server that is cut off says nothing at all; then a new connection must be tried some time.
        async with asyncio.timeout(_ANSWER_SECONDS):
            await self._db.insert(letter)


# Only where there is a database is SQLAlchemy worth its import.


def _concerns_database(error: BaseException) -> bool:
    from ..sql.errors import classify

    return classify(error) is not None


def _in_short(error: BaseException) -> str:
    """Without the statement and its parameters, of which some are secret."""
    from ..sql.errors import DatabaseError

    words = getattr(error, "orig", None) or (error.detail if isinstance(error, DatabaseError) else error)
    return f"{type(error).__name__}: {' '.join(str(words).split())[:300]}"
