"""Reads cursors of pages, stream entries and messages for the other modules."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from ..plumbing.base_task import BaseTask
from ..plumbing.broker.inspection import last_delivered, stream_heads
from ..plumbing.broker.models import TaskMessage
from ..plumbing.broker.stored import UNDECODABLE
from ..plumbing.broker.streams import ALL_STREAM_NAMES, resumed_stream
from ..plumbing.messages.codec import dumps, leading_fields
from ..plumbing.task_vo import vo_of
from .masking import masked_arguments

Registry = Mapping[str, "type[BaseTask]"]

#: Entries read by one command.
PAGE = 200
#: Lists read this much of a message; for a larger one they show its size in place of its arguments.
HEAD_BYTES = 65_536
_ENTRY = re.compile(r"(\d{1,20})-(\d{1,20})", re.ASCII)


def queue_of(stream: str) -> str:
    """Return the queue of a stream, `{priority}:{size}`."""
    return ":".join(stream.split(":")[2:4])


def streams_of_queue(queue: str) -> list[str]:
    """Return the streams of a queue, in the order in which workers read them."""
    for stream in ALL_STREAM_NAMES:
        if queue_of(stream) == queue:
            return [resumed_stream(stream), stream]
    known = ", ".join(queue_of(stream) for stream in ALL_STREAM_NAMES)
    raise ValueError(f"no queue {queue!r}; the queues are {known}")


@dataclass(frozen=True, slots=True)
class Head:
    """A message as read by lists: complete if small, else its leading fields."""

    message: TaskMessage | None
    """None if it cannot be decoded. If truncated, its last fields are missing."""
    whole: bool
    labels_known: bool
    bytes: int
    """Length of the whole message."""

    @property
    def task_name(self) -> str:
        """The registry name, or a placeholder if the message cannot be decoded."""
        return UNDECODABLE if self.message is None else self.message.task_name

    @property
    def failed_attempts(self) -> int | None:
        """Number of failed attempts; None if they were not read."""
        return None if self.message is None or not self.labels_known else len(self.message.attempts)

    def arguments(self, registry: Registry | None) -> dict[str, Any] | None:
        """Masked arguments; None if the message is truncated or cannot be decoded."""
        if self.message is None or not self.whole:
            return None
        return masked_arguments((registry or {}).get(self.message.task_name), self.message)

    def vo(self, registry: Registry | None) -> str | None:
        """The VO of the task; None if it has none, or the message is truncated or cannot be decoded."""
        if self.message is None or not self.whole:
            return None
        return vo_of((registry or {}).get(self.message.task_name), self.message)


def read_head(data: bytes, length: int) -> Head:
    """Decode the first bytes of a message whose full length is `length`."""
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
    """Read undelivered entries of a stream in order, truncated to `HEAD_BYTES`, with their length."""
    begin = await last_delivered(redis, stream)
    if begin is None:  # no such stream
        return []
    if after is not None and entry_parts(after) > entry_parts(begin):
        begin = after
    [entries] = await stream_heads(redis, [(stream, f"({begin}", "+", at_most)], HEAD_BYTES)
    return entries


def entry_parts(entry: str) -> tuple[int, int]:
    """Split the id of a stream entry into two comparable numbers."""
    ms, _, sequence = entry.partition("-")
    return int(ms), int(sequence)


def check_stream_cursor(after: str) -> str:
    """Validate a cursor into a stream."""
    parts = _ENTRY.fullmatch(after)
    if parts is None or max(map(int, parts.groups())) >= 1 << 64:
        raise wrong_cursor()
    return after


def wrong_cursor() -> ValueError:
    """Make the error for an invalid cursor. It does not quote it: the cursor may be of a task of another VO."""
    return ValueError("this cursor is not from a page before: use the field `after` of that page")


def parse_cursor(after: str) -> tuple[float, str]:
    """Parse a cursor of number and task id."""
    number, _, task_id = after.partition(" ")
    try:
        found = float(number)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise wrong_cursor()
    return found, task_id
