"""Submits messages: at once, delayed, as a group, or again from dead letters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from redis.exceptions import RedisError

from ..exceptions import DuplicateTaskIdError, SendTaskError
from . import scripts
from .models import Submission, in_ms
from .sizes import ALWAYS_TAKEN_BYTES, in_calls

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from .requests import GroupChild, GroupFields, Resubmission

#: Messages submitted by one script call.
SUBMIT_BATCH = 500
DELAY_BATCH = 100
#: Children of a group in one script call.
GROUP_BATCH = 500


async def submit(redis: Redis, submissions: Sequence[Submission]) -> None:
    """Submit messages. Raises as `RedisStreamBroker.submit`."""
    packed = [(submission, submission.dumpb()) for submission in submissions]
    _check_ids(submissions)
    try:
        now: dict[str, list[bytes]] = {}
        for submission, data in packed:
            if submission.at_time is None:
                now.setdefault(submission.stream, []).append(data)
        for stream, messages in now.items():
            for batch in in_calls(messages, SUBMIT_BATCH, len):
                await scripts.submit(redis, stream, batch)
        later = [
            (each.message.task_id, in_ms(each.at_time), each.stream, "at_time", data)
            for each, data in packed
            if each.at_time is not None
        ]
        later.sort(key=lambda message: message[1])  # the server wakes a scheduler for each new earliest due time
        for delayed in in_calls(later, DELAY_BATCH, lambda message: len(message[-1])):
            duplicate = await scripts.delay(redis, delayed)
            if duplicate is not None:
                name = duplicate.decode(errors="replace")
                raise DuplicateTaskIdError(
                    f"task id {name!r} belongs to a task that waits: leave it out, or cancel that task first"
                )
    except RedisError as error:
        names = ", ".join(sorted({submission.message.task_name for submission in submissions}))
        raise send_error(names, error, max(len(data) for _, data in packed)) from error


async def submit_group(
    redis: Redis, group_id: str, children: Sequence[Submission], fields: GroupFields, ttl_seconds: int
) -> int:
    """Create a group and submit its children. Raises as `RedisStreamBroker.submit_group`.

    Returns:
        The reply of lua/group.lua: 2 when the children have to be moved to their queues.
    """
    _check_ids(children)
    packed: list[GroupChild] = [
        {"task": c.message.task_id, "staged": c.stream.encode() + b"\n" + c.dumpb()} for c in children
    ]
    first_fields: GroupFields | None = {**fields, "ttl_ms": int(ttl_seconds * 1000)}
    reply = 0
    try:
        batches = list(in_calls(packed, GROUP_BATCH, lambda child: len(child["staged"]))) or [[]]
        for position, batch in enumerate(batches, start=1):
            last = position == len(batches)
            reply = await scripts.group(redis, group_id, first_fields, batch, last)
            first_fields = None
            if reply < 0:
                raise SendTaskError(f"cannot submit group {group_id}: the server has lost its beginning")
    except RedisError as error:
        largest = max((len(child["staged"]) for child in packed), default=0)
        raise send_error(f"group {group_id}", error, largest) from error
    return reply


async def resubmit(redis: Redis, tickets: Sequence[tuple[str, Submission]], ttl_ms: int) -> list[bool]:
    """Submit dead letters again, each ticket once within `ttl_ms`. Raises as `RedisStreamBroker.resubmit`.

    Returns:
        For each ticket, whether it was submitted now.
    """
    requests: list[Resubmission] = [
        {"ticket": ticket, "stream": submission.stream, "data": submission.message.dumpb()}
        for ticket, submission in tickets
    ]
    done: list[bool] = []
    try:
        for batch in in_calls(requests, SUBMIT_BATCH, lambda each: len(each["data"])):
            done += await scripts.resubmit(redis, batch, ttl_ms)
    except RedisError as error:
        raise SendTaskError(f"cannot submit {len(requests)} dead letters again: {error}") from error
    return done


def _check_ids(submissions: Sequence[Submission]) -> None:
    """Raise `DuplicateTaskIdError` when two submissions have the same id."""
    ids = [submission.message.task_id for submission in submissions]
    if len(set(ids)) < len(ids):
        [(twice, _)] = Counter(ids).most_common(1)
        raise DuplicateTaskIdError(f"two tasks have the id {twice!r}: nothing is submitted; leave the ids out")


def send_error(subject: str, error: RedisError, largest: int) -> SendTaskError:
    """Make the error of a failed submission, with a hint at the size of a large message."""
    hint = ""
    if largest >= ALWAYS_TAKEN_BYTES:
        hint = f" (the largest message has {largest} bytes; the server's proto-max-bulk-len is its limit)"
    return SendTaskError(f"cannot submit {subject}: {error}{hint}")
