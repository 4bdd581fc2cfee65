"""Retries calls while a server is unavailable, with backoff and one line in the log."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
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

_Result = TypeVar("_Result")

_SHORTEST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 2.0
#: Transient errors that have a class in redis-py, without the error code in their message.
_TRANSIENT = (
    RedisConnectionError,  # and LOADING
    RedisTimeoutError,
    ClusterDownError,
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    TryAgainError,
    OSError,
)
#: Errors if no sentinel knows a primary, or responds.
NO_PRIMARY = (MasterNotFoundError, SyncMasterNotFoundError)
#: Messages of unsupported commands and scripts, which do not depend on the data.
_UNSUPPORTED = re.compile(
    r"unknown (redis |sub)?command|error compiling script|not allowed from script|undeclared key"
    r"|script attempted to access (a slot not served|a non local key|keys that do not hash)",
    re.IGNORECASE,
)
#: Codes of other transient errors. UNBLOCKED: the server became a replica during a blocking command.
_TRANSIENT_CODES = frozenset({"BUSY", "MISCONF", "NOREPLICAS", "UNBLOCKED", "UNKILLABLE"})


def is_transient(error: BaseException) -> bool:
    """Return whether the server may accept the same call later."""
    if isinstance(error, AuthenticationError | AuthorizationError):
        return False
    if isinstance(error, _TRANSIENT):
        return True
    # For a command in a pipeline, redis-py appends the message as a tuple.
    message = str(error).rpartition(" of pipeline caused error: ")[2].lstrip("('\"")
    return isinstance(error, ResponseError) and message.split(" ", 1)[0] in _TRANSIENT_CODES


def may_pass(error: BaseException) -> bool:
    """Return whether the error is transient, or caused by data that an operator can repair.

    For loops of a process that must continue. Missing permissions and unsupported commands are permanent.
    """
    if is_transient(error):
        return True
    refused = isinstance(error, NoPermissionError | ClusterCrossSlotError | AskError)  # AskError: MOVED, too
    return isinstance(error, ResponseError) and not refused and not _UNSUPPORTED.search(str(error))


def is_write_to_closed(error: BaseException) -> bool:
    """Return whether uvloop refuses a write because the connection was lost.

    The event loop of asyncio accepts such a write, and the next read reports the loss.
    """
    return isinstance(error, RuntimeError) and str(error).endswith("; the handler is closed")


def reason(error: BaseException) -> str:
    """Return the message of an error on one line, without the objects of redis-py."""
    text = str(error).rstrip(".") or type(error).__name__
    if isinstance(error, NO_PRIMARY):
        message, errors, _ = text.partition(" : ")
        return f"{message}; not every sentinel responds" if errors else f"{message}: no sentinel knows it"
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


class Outage(Backoff):
    """Unavailability of a server, for a loop that retries: one line in the log when it begins, one when it ends.

    Args:
        what: the action for the log.
    """

    def __init__(self, what: str, log: logging.Logger = logger) -> None:
        super().__init__()
        self._what, self._log = what, log
        self.since: float | None = None
        """Time (`time.monotonic`) of the first failure; None if the last call succeeded."""

    def failed(self, why: str, since: float | None = None) -> float:
        """Note a failure; return the pause before the next attempt (s).

        Args:
            since: start of the failed call, by default now.
        """
        if self.since is None:
            self.since = time.monotonic() if since is None else since
            self._log.warning("cannot %s: %s; trying again until it works", self._what, why)
        return self.next()

    def over(self) -> None:
        """Note a success."""
        if self.since is not None:
            self.since = None
            self._log.warning("can %s again", self._what)
            self._pause = _SHORTEST_PAUSE_SECONDS


async def retry_until_available(
    call: Callable[[], Awaitable[_Result]],
    what: str,
    *,
    passing: Callable[[BaseException], bool] = is_transient,
    stop: asyncio.Event | None = None,
) -> _Result:
    """Repeat an idempotent call until the server responds.

    Args:
        what: the action for the log, see `Outage`.
        passing: returns whether to retry after an error.
        stop: once it is set, errors are raised.
    """
    outage = Outage(what)
    while True:
        try:
            result = await call()
        except Exception as error:
            if not passing(error) or (stop is not None and stop.is_set()):
                raise
            await asyncio.sleep(outage.failed(reason(error)))
        else:
            outage.over()
            return result
