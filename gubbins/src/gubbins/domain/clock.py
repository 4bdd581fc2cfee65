"""Clock of the pilot system: the time of the connected database, or of a simulation.

All times in the database come from its own clock, so that clock differences between hosts have no effect.
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
database = DatabaseClock()


def now() -> datetime:
    """Current time in UTC."""
    clock = _clock.get()
    return database.now() if clock is None else clock()


def follow(engine: AsyncEngine) -> None:
    """Use the clock of this database."""
    database.synchronize(engine)


@contextlib.contextmanager
def simulated(clock: Callable[[], datetime]) -> Iterator[None]:
    """Replace the clock by a function (aware, UTC) in this block and the asyncio tasks started in it."""
    token = _clock.set(clock)
    try:
        yield
    finally:
        _clock.reset(token)
