"""What time it is: all of the pilot system asks here, so that a simulation can let a day pass in seconds."""

from __future__ import annotations

__all__ = ["now", "simulated"]

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import UTC, datetime

_clock: ContextVar[Callable[[], datetime] | None] = ContextVar("clock", default=None)


def now() -> datetime:
    """The present time, in UTC."""
    clock = _clock.get()
    return datetime.now(tz=UTC) if clock is None else clock()


@contextlib.contextmanager
def simulated(clock: Callable[[], datetime]) -> Iterator[None]:
    """Within this block, and the asyncio tasks begun there, `clock` (aware, UTC) says what time it is."""
    token = _clock.set(clock)
    try:
        yield
    finally:
        _clock.reset(token)
