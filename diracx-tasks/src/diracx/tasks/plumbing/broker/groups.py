"""Reads callback groups: progress, failures, and the results kept for a callback."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from redis.exceptions import ResponseError

from ..exceptions import ResultIsMissingError
from . import keys
from .models import TaskResult
from .scripts import script
from .stored import SCANNED, UNDECODABLE, moment_of, number_of, text_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from redis.asyncio import Redis

#: Groups that are read in one transaction.
_GROUPS_BATCH = 100


class GroupState(StrEnum):
    """State of a group. A group that has called back is deleted."""

    SUBMITTING = "submitting"
    """Not all its children have arrived; none of them runs."""
    PENDING = "pending"
    """Children have yet to end, and none has failed so far."""
    FAILED = "failed"
    """A child has failed permanently."""


@dataclass(frozen=True, kw_only=True)
class GroupStatus:
    """One callback group."""

    group_id: str
    state: GroupState
    total: int
    """Number of children."""
    succeeded: int
    pending: int
    failed: int
    callback: str
    """Registry name of the task that is submitted when all have succeeded."""
    on_failure: str | None
    """Registry name of the task that is submitted instead when one has failed."""
    created: datetime
    expires: datetime
    """Time when the group is deleted, if nothing happens until then."""
    pending_children: list[str] = field(default_factory=list)
    """Task ids; filled by `read_group` only, like `failed_children`."""
    failed_children: dict[str, str] = field(default_factory=dict)
    """Task id -> type and message of the error."""


async def read_group(redis: Redis, group_id: str) -> GroupStatus | None:
    """Read one group with its children; None when it does not exist (any more)."""
    key = keys.GROUPS_PREFIX + group_id
    statuses = await _read(redis, [group_id])
    if not statuses:
        return None
    [status] = statuses
    pending = {text_of(child) async for child in redis.sscan_iter(f"{key}:pending", count=SCANNED)}
    status.pending_children.extend(sorted(pending))
    async for child, error in redis.hscan_iter(f"{key}:failed", count=SCANNED):
        status.failed_children[text_of(child)] = text_of(error)
    return status


async def group_ids(redis: Redis) -> list[str]:
    """Ids of all groups, ordered by expiry."""
    found = {text_of(group): expires async for group, expires in redis.zscan_iter(keys.GROUPS, count=SCANNED)}
    return sorted(found, key=lambda group: found[group])


async def group_of(redis: Redis, child: bytes) -> str | None:
    """Search all groups for the one that waits for this task; None when none does."""
    for batch in _batches(await group_ids(redis), _GROUPS_BATCH):
        async with redis.pipeline(transaction=False) as pipe:
            for group in batch:
                pipe.execute_command("SISMEMBER", f"{keys.GROUPS_PREFIX}{group}:pending", child)
            for group, waits in zip(batch, await pipe.execute(raise_on_error=False), strict=True):
                if waits == 1:  # not an error, as for a key of the wrong type
                    return group
    return None


async def request_audit(redis: Redis) -> None:
    """Make the leading scheduler audit the groups soon, as an unreadable message may have been a child of one."""
    await redis.delete(keys.GROUPS_AUDITED)


async def list_groups(redis: Redis, limit: int | None = None) -> list[GroupStatus]:
    """Read all groups that have not called back, oldest first.

    Args:
        limit: read at most so many groups, those that expire first.
    """
    if limit is None:
        listed = await group_ids(redis)
    else:
        listed = [text_of(group) for group in await redis.zrange(keys.GROUPS, 0, max(0, limit - 1))]
    statuses: list[GroupStatus] = []
    for batch in _batches(listed, _GROUPS_BATCH):
        statuses += await _read(redis, batch)
    return sorted(statuses, key=lambda status: status.created)


def _batches(items: list[str], size: int) -> Iterator[list[str]]:
    return (items[first : first + size] for first in range(0, len(items), size))


async def _read(redis: Redis, group_ids: Sequence[str]) -> list[GroupStatus]:
    fields = ("total", "submitting", "created", "callback_name", "failure_name")
    async with redis.pipeline(transaction=True) as pipe:
        for group_id in group_ids:
            key = keys.GROUPS_PREFIX + group_id
            pipe.execute_command("HMGET", key, *fields)
            pipe.execute_command("SCARD", f"{key}:pending")
            pipe.execute_command("HLEN", f"{key}:failed")
            pipe.execute_command("ZSCORE", keys.GROUPS, group_id)
        all_replies = await pipe.execute(raise_on_error=False)
    statuses = []
    for position, group_id in enumerate(group_ids):
        replies = all_replies[4 * position : 4 * position + 4]
        refused = [reply for reply in replies if isinstance(reply, ResponseError)]
        if refused and str(refused[0]).startswith("WRONGTYPE"):  # not a group: go on with the others
            continue
        if refused:
            raise refused[0]
        values, pending, failed, expires = replies
        if values[0] is None or expires is None:
            continue
        total, submitting = number_of(values[0]), values[1] is not None
        if submitting:
            state, pending = GroupState.SUBMITTING, total
        else:
            state = GroupState.FAILED if failed else GroupState.PENDING
        statuses.append(
            GroupStatus(
                group_id=group_id,
                state=state,
                total=total,
                succeeded=max(0, total - pending - failed),
                pending=pending,
                failed=failed,
                callback=UNDECODABLE if values[3] is None else text_of(values[3]),
                on_failure=None if values[4] is None else text_of(values[4]),
                created=moment_of(number_of(values[2]) / 1000),
                expires=moment_of(float(expires) / 1000),
            )
        )
    return statuses


async def read_results(redis: Redis, group_id: str, total: int) -> dict[str, TaskResult[Any]]:
    """Results of a group's children by task id, in the order of the children; without children that have none yet.

    Args:
        total: number of children.

    Raises:
        ResultIsMissingError: when the results were not kept, or have expired.
    """
    key = keys.GROUPS_PREFIX + group_id
    children: list[bytes] = []
    while part := await redis.execute_command(
        "LRANGE", f"{key}:children", len(children), len(children) + SCANNED - 1
    ):
        children += part
    if len(children) != total:
        raise ResultIsMissingError(f"the results of the children of group {group_id} are not kept any more")
    results = {}
    for first in range(0, total, SCANNED):
        batch = children[first : first + SCANNED]
        stored: Any = await redis.execute_command("HMGET", f"{key}:results", *batch)
        for child, data in zip(batch, stored, strict=True):
            if data is not None:
                results[child.decode()] = TaskResult.loadb(data)
    return results


async def fire(redis: Redis, group_id: str) -> bool:
    """Submit a group's callback now. False when the group does not exist (any more)."""
    return bool(await script("fire")(redis, args=[group_id]) == 1)
