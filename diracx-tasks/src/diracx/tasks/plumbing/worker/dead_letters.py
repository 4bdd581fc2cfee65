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


def _database_may_return(error: BaseException) -> bool:
    from diracx.db.exceptions import DBUnavailableError
    from sqlalchemy.exc import SQLAlchemyError

    return isinstance(error, DBUnavailableError | SQLAlchemyError | OSError)


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

        As long as the database is away the task stays unacknowledged in this worker's hands. A letter that no
        waiting will get into the database waits in Redis.
        """
        if self._db is not None:
            try:
                await patiently(partial(self._insert, letter), "store a dead letter", passing=_database_may_return)
                return settlement
            except Exception:
                logger.exception("the dead letter of task %s cannot be stored: it waits in Redis", letter.task_id)
        settlement.dead = in_redis(letter)
        return settlement

    async def adopt(self) -> int:
        """Move letters that waited for a database into ours. Returns how many."""
        moved, after = 0, "-"
        while self._db is not None:
            entries: Any = await self._broker.redis.xrange(keys.DEAD_LETTERS, min=after, count=_BATCH)
            for entry, fields in entries:
                after = f"({entry.decode()}"
                try:
                    await self._insert(DeadLetter.of_entry(entry.decode(), fields))
                except Exception:
                    logger.exception("the dead letter %s stays in Redis", entry.decode())
                    continue
                await self._broker.redis.execute_command("XDEL", keys.DEAD_LETTERS, entry)
                moved += 1
            if not entries:
                break
        if moved:
            await self._forget_empty_stream()
            logger.info("took %d dead letters from Redis into the database", moved)
        return moved

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
        async with asyncio.timeout(_ANSWER_SECONDS), self._db as db:
            await db.insert(letter)
