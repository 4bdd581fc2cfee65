"""Cursors of pages, and the reading of stream entries and messages: shared by the other modules."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from redis.asyncio import Redis

from ..plumbing.base_task import BaseTask
from ..plumbing.broker.inspection import last_delivered, stream_heads
from ..plumbing.broker.models import TaskMessage
from ..plumbing.broker.stored import UNDECODABLE, moment_of, text_of
from ..plumbing.broker.streams import ALL_STREAM_NAMES, resumed_stream
from ..plumbing.messages.codec import dumps, leading_fields
from ..plumbing.task_vo import vo_of
from .masking import masked_arguments

Registry = Mapping[str, "type[BaseTask]"]

#: Entries that are read with one command.
PAGE = 200
#: Of each message a list reads so many bytes at most; of a larger one it shows the size in place of its arguments.
HEAD_BYTES = 65_536
_ENTRY = re.compile(r"(\d{1,20})-(\d{1,20})", re.ASCII)
_LONGEST_TOLD = 40


def queue_of(stream: str) -> str:
    """`{priority}:{size}` of a stream."""
    return ":".join(stream.split(":")[2:4])


def streams_of_queue(queue: str) -> list[str]:
    """The streams of a queue, in the order in which workers look into them.

    Raises:
        ValueError: when there is no such queue.
    """
    for stream in ALL_STREAM_NAMES:
        if queue_of(stream) == queue:
            return [resumed_stream(stream), stream]
    known = ", ".join(queue_of(stream) for stream in ALL_STREAM_NAMES)
    raise ValueError(f"there is no queue {queue!r}; the queues are {known}")


def moment(seconds: float) -> datetime:
    """A moment from seconds since the epoch."""
    return moment_of(seconds)


def text(value: Any) -> str:
    """Decode a reply of the server to text."""
    return text_of(value)


def as_mapping(reply: Any) -> dict[Any, Any]:
    """A hash, in whatever protocol it came."""
    if isinstance(reply, Mapping):
        return dict(reply)
    return dict(zip(reply[::2], reply[1::2], strict=True))


def scored(reply: Any) -> list[tuple[Any, float]]:
    """Members and scores, in whatever protocol they came."""
    if reply and isinstance(reply[0], list | tuple):
        return [(member, float(score)) for member, score in reply]
    return [(member, float(score)) for member, score in zip(reply[::2], reply[1::2], strict=True)]


@dataclass(frozen=True, slots=True)
class Head:
    """Head of a message that a list shows: all of a small one, the leading fields of a large one."""

    message: TaskMessage | None
    """None when it is no task message. Of one that is not whole the last fields are missing."""
    whole: bool
    labels_known: bool
    bytes: int
    """Length of the whole message."""

    @property
    def task_name(self) -> str:
        """Says so where it cannot be decoded."""
        return UNDECODABLE if self.message is None else self.message.task_name

    @property
    def failed_attempts(self) -> int | None:
        """None where the list did not read so far."""
        return None if self.message is None or not self.labels_known else len(self.message.attempts)

    def arguments(self, registry: Registry | None) -> dict[str, Any] | None:
        """Masked; None where the message is too large for a list, or no message."""
        if self.message is None or not self.whole:
            return None
        return masked_arguments((registry or {}).get(self.message.task_name), self.message)

    def vo(self, registry: Registry | None) -> str | None:
        """The VO of the task; None: it has none, or the message is too large for a list, or no message."""
        if self.message is None or not self.whole:
            return None
        return vo_of((registry or {}).get(self.message.task_name), self.message)


def read_head(data: bytes, length: int) -> Head:
    """A message of which the first bytes are at hand.

    Args:
        length: of the whole.
    """
    whole = len(data) >= length
    try:
        fields, cut_off = leading_fields(data)
        message = TaskMessage.loadb(data if whole else dumps(fields))
    except ValueError:
        return Head(None, whole, False, length)
    return Head(message, whole, cut_off != "labels", length)


async def waiting_heads(
    redis: Redis, stream: str, after: str | None, at_most: int
) -> list[tuple[str, dict[bytes, bytes], int]]:
    """Entries of a stream that no worker has taken, in their order: cut off after `HEAD_BYTES`, with their length.

    Args:
        after: an entry to read on from.
    """
    begin = await _waiting_since(redis, stream, after)
    if begin is None:
        return []
    [entries] = await stream_heads(redis, [(stream, f"({begin}", "+", at_most)], HEAD_BYTES)
    return entries


async def _waiting_since(redis: Redis, stream: str, after: str | None) -> str | None:
    """The entry after which those are that no worker has taken; None: there is no such stream."""
    begin = await last_delivered(redis, stream)
    if begin is not None and after is not None and entry_parts(after) > entry_parts(begin):
        begin = after
    return begin


def entry_parts(entry: str) -> tuple[int, int]:
    """The id of a stream entry as two numbers, that can be compared.

    Raises:
        ValueError: when it is none.
    """
    ms, _, sequence = entry.partition("-")
    return int(ms), int(sequence)


def place_in_stream(after: str) -> str:
    """Check a cursor into a stream, from the page before.

    Raises:
        ValueError: when it is none.
    """
    parts = _ENTRY.fullmatch(after)
    if parts is None or max(map(int, parts.groups())) >= 1 << 64:
        raise ValueError(f"{after[:_LONGEST_TOLD]!r} is not from a page before")
    return after


def place_in_order(after: str) -> tuple[float, str]:
    """Read a cursor of number and task id, from the page before.

    Raises:
        ValueError: when they are none.
    """
    number, _, task_id = after.partition(" ")
    try:
        found = float(number)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"{after[:_LONGEST_TOLD]!r} is not from a page before")
    return found, task_id
