"""Limits of the size of one message, and of one call of the server."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from ..exceptions import TaskConfigError, TaskTooLargeError

MAX_MESSAGE_BYTES_VARIABLE = "DIRACX_TASKS_MAX_MESSAGE_BYTES"
#: What every database of dead letters takes, too: MariaDB's packets have 16 MiB, and quoting can double the bytes.
MAX_BYTES = 4 * 1024 * 1024
#: Bytes in one call of a script, but for what is larger alone.
CALL_BYTES = 1024 * 1024
#: What a lock counts in a call: 100 of them, as one task may have, keep the server busy for up to 5 ms, where
#: others wait for each.
LOCK_BYTES = 10_000
#: What every server takes: `proto-max-bulk-len` is at least 1 MiB.
ALWAYS_TAKEN_BYTES = 1_000_000
#: No limit is below this.
SMALL_BYTES = 10_000

_Item = TypeVar("_Item")


def max_message_bytes() -> int:
    """The largest message that may be submitted, from DIRACX_TASKS_MAX_MESSAGE_BYTES.

    Raises:
        TaskConfigError: when that is no number, or too small.
    """
    given = os.environ.get(MAX_MESSAGE_BYTES_VARIABLE)
    if not given:
        return MAX_BYTES
    if not (given.isascii() and given.isdigit() and int(given[:19]) >= SMALL_BYTES):
        raise TaskConfigError(
            f"{MAX_MESSAGE_BYTES_VARIABLE} must be a number of bytes, at least {SMALL_BYTES}, not {given[:50]!r}"
        )
    return int(given[:19])


def checked_size(data: bytes, task_name: str) -> bytes:
    """The message as it may be submitted.

    Raises:
        TaskTooLargeError: when it is too large.
    """
    if len(data) > (longest := max_message_bytes()):
        raise TaskTooLargeError(
            f"cannot submit {task_name}: its message has {len(data)} bytes, more than {longest}; pass where the "
            f"data are instead of the data, or raise {MAX_MESSAGE_BYTES_VARIABLE}"
        )
    return data


def in_calls(items: Iterable[_Item], at_most: int, size_of: Callable[[_Item], int]) -> Iterator[list[_Item]]:
    """The items in portions for one call each: so many, and `CALL_BYTES`, at most."""
    portion: list[_Item] = []
    total = 0
    for item in items:
        size = size_of(item)
        if portion and (len(portion) == at_most or total + size > CALL_BYTES):
            yield portion
            portion, total = [], 0
        portion.append(item)
        total += size
    if portion:
        yield portion
