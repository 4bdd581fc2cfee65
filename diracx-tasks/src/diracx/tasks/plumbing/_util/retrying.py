"""Retry calls while a server is unavailable: back off, try again, log it once."""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Awaitable, Callable
from typing import TypeVar

from redis.asyncio.sentinel import MasterNotFoundError
from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthorizationError,
    ClusterCrossSlotError,
    ClusterDownError,
    MasterDownError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.sentinel import MasterNotFoundError as SyncMasterNotFoundError

logger = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

_SHORTEST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 2.0
#: Refusals that pass by themselves. Where redis-py has a class for one, its message lacks the first word.
_PASSING = (
    RedisConnectionError,  # and LOADING
    RedisTimeoutError,
    ClusterDownError,
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    TryAgainError,
    OSError,
)
#: When the sentinels know of none, or do not answer.
NO_PRIMARY = (MasterNotFoundError, SyncMasterNotFoundError)
#: What a server says that cannot do what is asked, whatever the data.
_CANNOT = re.compile(
    r"unknown (redis |sub)?command|error compiling script|not allowed from script|undeclared key"
    r"|script attempted to access (a slot not served|a non local key|keys that do not hash)",
    re.IGNORECASE,
)
#: First words of the others. UNBLOCKED: the server became a replica, or had to close, while we waited.
_PASSING_WORDS = frozenset({"BUSY", "MISCONF", "NOREPLICAS", "UNBLOCKED", "UNKILLABLE"})


def is_transient(error: BaseException) -> bool:
    """Return whether the server may accept the same call a little later."""
    if isinstance(error, AuthenticationError | AuthorizationError):
        return False
    if isinstance(error, _PASSING):
        return True
    # Of a command in a pipeline, redis-py gives the words as a tuple at the end of its own.
    words = str(error).rpartition(" of pipeline caused error: ")[2].lstrip("('\"")
    return isinstance(error, ResponseError) and words.split(" ", 1)[0] in _PASSING_WORDS


def may_pass(error: BaseException) -> bool:
    """Return whether an operator may repair the data that the server refuses, as a key of another type than it
    should be. For what a process does all the time, and must not end for.

    No repair of data helps where the server, or the user, cannot do what is asked.
    """
    if is_transient(error):
        return True
    refused = isinstance(error, NoPermissionError | ClusterCrossSlotError | AskError)  # AskError: MOVED, too
    return isinstance(error, ResponseError) and not refused and not _CANNOT.search(str(error))


def is_write_to_closed(error: BaseException) -> bool:
    """Return whether uvloop refuses a write because the connection was lost.

    The event loop of asyncio accepts such a write, and the next read reports the loss.
    """
    return isinstance(error, RuntimeError) and str(error).endswith("; the handler is closed")


def reason(error: BaseException) -> str:
    """Return the message of an error on one line, without redis-py's own objects."""
    text = str(error).rstrip(".") or type(error).__name__
    if isinstance(error, NO_PRIMARY):
        said, silent, _ = text.partition(" : ")
        return f"{said}; not every sentinel answers" if silent else f"{said}: no sentinel knows it"
    return text


class Backoff:
    """Backoff between retries: longer each time, with jitter."""

    def __init__(self) -> None:
        self._pause = _SHORTEST_PAUSE_SECONDS

    def next(self) -> float:
        """Return the next pause (s)."""
        pause = self._pause
        self._pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        return pause * random.uniform(0.5, 1.0)

    def succeeded(self) -> None:
        """Reset to the shortest pause."""
        self._pause = _SHORTEST_PAUSE_SECONDS


async def retry_until_available(
    call: Callable[[], Awaitable[_Answer]],
    what: str,
    *,
    passing: Callable[[BaseException], bool] = is_transient,
    stop: asyncio.Event | None = None,
) -> _Answer:
    """Repeat a call until the server answers. Only for calls that may be repeated.

    Args:
        what: what is being attempted, for the log: one line when it begins to fail, one when it succeeds again.
        stop: once it is set, an error is raised instead of being waited out.
    """
    pauses = Backoff()
    failed = False
    while True:
        try:
            answer = await call()
        except Exception as error:
            if not passing(error) or (stop is not None and stop.is_set()):
                raise
            if not failed:
                logger.warning("cannot %s: %s; trying again until it works", what, reason(error))
            failed = True
            await asyncio.sleep(pauses.next())
        else:
            if failed:
                logger.warning("can %s again", what)
            return answer
