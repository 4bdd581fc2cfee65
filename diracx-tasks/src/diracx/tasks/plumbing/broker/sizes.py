"""Limits of the size of a message, and of one call of the server."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from ..exceptions import TaskConfigError, TaskTooLargeError

MAX_MESSAGE_BYTES_VARIABLE = "DIRACX_TASKS_MAX_MESSAGE_BYTES"
#: Default limit of a message. Every database accepts a dead letter of this size: MariaDB's packets have 16 MiB,
#: and quoting can double the bytes.
MAX_BYTES = 4 * 1024 * 1024
#: Bytes in one call of a script; a single larger message gets a call of its own.
CALL_BYTES = 1024 * 1024
#: Weight of a lock in a call: 100 locks, the limit of a task, take the server up to 5 ms if other tasks wait for
#: each of them.
LOCK_BYTES = 10_000
#: Size that every server accepts: `proto-max-bulk-len` is at least 1 MiB.
ALWAYS_TAKEN_BYTES = 1_000_000
#: Smallest limit of a message that can be configured.
SMALL_BYTES = 10_000

_Item = TypeVar("_Item")


def max_message_bytes() -> int:
    """Size of the largest message that may be submitted, from DIRACX_TASKS_MAX_MESSAGE_BYTES.

    Raises:
        TaskConfigError: when the variable is not a number, or too small.
    """
    text = os.environ.get(MAX_MESSAGE_BYTES_VARIABLE)
    if not text:
        return MAX_BYTES
    if not (text.isascii() and text.isdigit() and int(text[:19]) >= SMALL_BYTES):
        raise TaskConfigError(
            f"{MAX_MESSAGE_BYTES_VARIABLE} must be a number of bytes, at least {SMALL_BYTES}, not {text[:50]!r}"
        )
    return int(text[:19])


def checked_size(data: bytes, task_name: str) -> bytes:
    """Return the message if it is not too large.

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
    """Split items into batches for one call each: `at_most` items, and `CALL_BYTES` together."""
    batch: list[_Item] = []
    total = 0
    for item in items:
        size = size_of(item)
        if batch and (len(batch) == at_most or total + size > CALL_BYTES):
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size
    if batch:
        yield batch
