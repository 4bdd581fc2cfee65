"""Where dead letters go: into SQL before the broker is told, or into a stream until there is a database."""

from __future__ import annotations

import logging
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from ..broker import keys
from ..patience import patiently
from ..persistence.letter import DeadLetter
from ..wire import dumps, loads

if TYPE_CHECKING:
    from ..broker import RedisStreamBroker
    from ..broker.models import Settlement
    from ..persistence import TaskDB

logger = logging.getLogger(__name__)

_BATCH = 100


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

        As long as the database is away the task stays unacknowledged in this worker's hands.
        """
        if self._db is None:
            settlement.dead = in_redis(letter)
        else:
            await patiently(partial(self._insert, letter), "store a dead letter", passing=_database_may_return)
        return settlement

    async def adopt(self) -> int:
        """Move letters that waited for a database into ours. Returns how many."""
        moved = 0
        while self._db is not None:
            entries: Any = await self._broker.redis.xrange(keys.DEAD_LETTERS, count=_BATCH)
            if not entries:
                break
            for entry, fields in entries:
                await self._insert(DeadLetter(**loads(fields[b"data"])))
                await self._broker.redis.execute_command("XDEL", keys.DEAD_LETTERS, entry)
                moved += 1
        if moved:
            await self._broker.redis.delete(keys.DEAD_LETTERS)
            logger.info("took %d dead letters from Redis into the database", moved)
        return moved

    async def _insert(self, letter: DeadLetter) -> None:
        assert self._db is not None
        async with self._db as db:
            await db.insert(letter)
