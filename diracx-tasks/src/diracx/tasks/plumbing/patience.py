"""Going on when a server is away: back off, try again, say so once."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from redis.exceptions import AuthenticationError, BusyLoadingError, ReadOnlyError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

logger = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

_LONGEST_PAUSE_SECONDS = 2.0
#: First words of refusals that pass by themselves.
_PASSING = (
    "BUSY",
    "CLUSTERDOWN",
    "LOADING",
    "MASTERDOWN",
    "MISCONF",
    "NOREPLICAS",
    "OOM",
    "READONLY",
    "TRYAGAIN",
)


def is_passing(error: BaseException) -> bool:
    """Whether the server may well accept the same call a little later."""
    if isinstance(error, AuthenticationError):
        return False
    if isinstance(error, RedisConnectionError | RedisTimeoutError | BusyLoadingError | ReadOnlyError | OSError):
        return True
    return isinstance(error, ResponseError) and str(error).startswith((*_PASSING, "UNBLOCKED"))


async def patiently(
    call: Callable[[], Awaitable[_Answer]],
    what: str,
    *,
    passing: Callable[[BaseException], bool] = is_passing,
    stop: asyncio.Event | None = None,
) -> _Answer:
    """Repeat a call until the server answers. Only for calls that may be repeated.

    Args:
        what: what is being attempted, for the log: one line when it begins to fail, one when it succeeds again.
        stop: once it is set, an error is raised instead of being waited out.
    """
    pause = 0.05
    failed = False
    while True:
        try:
            answer = await call()
        except Exception as error:
            if not passing(error) or (stop is not None and stop.is_set()):
                raise
            if not failed:
                logger.warning("cannot %s: %s; trying again until it works", what, error)
            failed = True
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        else:
            if failed:
                logger.warning("can %s again", what)
            return answer
