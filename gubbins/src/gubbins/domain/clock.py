"""Clock of the pilot system, which a simulation can replace to let a day pass in seconds.

It is the time of the database that this process is connected to: the moments in it come from many machines, and a
pilot of one that is ten minutes ahead must not be lost ten minutes early to the others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import datetime
from typing import TYPE_CHECKING

from diracx.tasks.plumbing.sql.clock import DatabaseClock

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

_clock: ContextVar[Callable[[], datetime] | None] = ContextVar("clock", default=None)
_database = DatabaseClock()


def now() -> datetime:
    """The present time, in UTC."""
    clock = _clock.get()
    return _database.now() if clock is None else clock()


def follow(engine: AsyncEngine) -> None:
    """Go by the clock of this database from now on."""
    _database.follow(engine)


@contextlib.contextmanager
def simulated(clock: Callable[[], datetime]) -> Iterator[None]:
    """Within this block, and the asyncio tasks begun there, `clock` (aware, UTC) says what time it is."""
    token = _clock.set(clock)
    try:
        yield
    finally:
        _clock.reset(token)
