"""Clock of the pilot system: the time of the connected database, or of a simulation.

All times in the database come from its own clock, so that clock differences between hosts have no effect.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import datetime

from diracx.tasks.plumbing.sql.clock import DatabaseClock

_clock: ContextVar[Callable[[], datetime] | None] = ContextVar("clock", default=None)
database = DatabaseClock()
"""Clock of the connected database."""


def now() -> datetime:
    """Current time in UTC."""
    clock = _clock.get()
    return database.now() if clock is None else clock()


@contextlib.contextmanager
def simulated(clock: Callable[[], datetime]) -> Iterator[None]:
    """Replace the clock by a function (aware, UTC) in this block and the asyncio tasks started in it."""
    token = _clock.set(clock)
    try:
        yield
    finally:
        _clock.reset(token)
