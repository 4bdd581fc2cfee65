"""Finds children of groups that the server has lost, and fails them, so that their group ends.

A server that restarts, or a replica that takes over, may lack the last writes. A group would wait for a lost child
until the group expires.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError, ResponseError

from . import keys, scripts
from .groups import group_ids
from .stored import SCANNED

if TYPE_CHECKING:
    from collections.abc import Iterable

    from redis.asyncio import Redis

logger = logging.getLogger(__name__)

#: Interval at which the leading scheduler checks whether an audit is due.
POLL_SECONDS = 15.0
#: Interval of audits without a restart or failover.
AUDIT_SECONDS = 86_400
#: Rounds of the search: a child that moves during a round can be missed.
_ROUNDS = 3
ENTRIES = 100
CHILDREN = 200
_ERROR = "LostByServer: it is in no place any more; the server has lost it"


async def audit_periodically(redis: Redis) -> None:
    """Audit whenever it is due, until cancelled; goes on after errors of the server."""
    while True:
        try:
            await audit_if_due(redis)
        except (RedisError, OSError) as error:
            logger.warning("cannot look for lost children of groups: %s", error)
        await asyncio.sleep(POLL_SECONDS)


async def audit_if_due(redis: Redis) -> int | None:
    """Audit if the server was restarted or replaced since the last audit, or that is a day ago.

    Returns:
        Number of failed children; None without an audit.
    """
    server = await _identity(redis)
    audited: Any = await redis.get(keys.GROUPS_AUDITED)
    if audited == server:
        return None
    failed = await fail_lost_children(redis)
    await redis.set(keys.GROUPS_AUDITED, server, ex=AUDIT_SECONDS)
    return failed


async def _identity(redis: Redis) -> bytes:
    """Id of the server's process and its replication history: changes with each restart and failover."""
    try:
        server, replication = await redis.info("server"), await redis.info("replication")
    except ResponseError:  # INFO is not permitted: audit once a day
        return b"unknown"
    return f"{server.get('run_id')} {replication.get('master_replid')}".encode()


async def fail_lost_children(redis: Redis) -> int:
    """Fail children that are neither in a stream nor delayed, although their group waits for them.

    Returns:
        Number of failed children.
    """
    missing = await _awaited_children(redis)
    for _ in range(_ROUNDS):
        if not missing:
            return 0
        await _find_delayed(redis, missing)
        await _find_queued(redis, missing)
        await _find_delayed(redis, missing)
    groups: dict[str, list[bytes]] = {}
    for child, group in missing.items():
        groups.setdefault(group, []).append(child)
    failed = 0
    for group, children in groups.items():
        try:
            for batch in _batches(children):
                failed += await scripts.fail_children(redis, group, _ERROR, batch)
        except ResponseError as error:
            logger.error("cannot fail the lost children of group %r: %s", group, error)
            continue
        logger.error("group %s waited for %d children that the server has lost: they failed", group, len(children))
    return failed


async def _awaited_children(redis: Redis) -> dict[bytes, str]:
    """Child -> group, for all children that completely submitted groups wait for."""
    found: dict[bytes, str] = {}
    for group in await group_ids(redis):
        key = keys.GROUPS_PREFIX + group
        try:
            if await redis.hexists(key, "submitting") or await redis.exists(f"{key}:staged"):
                continue
            async for child in redis.sscan_iter(f"{key}:pending", count=SCANNED):
                found[child] = group
        except ResponseError as error:  # a key of the wrong type, say: go on with the other groups
            logger.warning("cannot look for lost children of group %r: %s", group, error)
    return found


async def _find_delayed(redis: Redis, missing: dict[bytes, str]) -> None:
    for batch in _batches(list(missing)):
        async with redis.pipeline(transaction=False) as pipe:
            for child in batch:
                pipe.execute_command("HEXISTS", keys.DELAYED_DATA, child)
            for child, delayed in zip(batch, await pipe.execute(), strict=True):
                if delayed:
                    del missing[child]


async def _find_queued(redis: Redis, missing: dict[bytes, str]) -> None:
    for stream in keys.EVERY_STREAM:
        begin = "-"
        while missing:
            last, *tasks = await scripts.task_ids(redis, stream, begin, ENTRIES)
            if not last:
                break
            for task in tasks:
                missing.pop(task, None)
            begin = f"({last.decode()}"


def _batches(children: list[Any]) -> Iterable[list[Any]]:
    return (children[first : first + CHILDREN] for first in range(0, len(children), CHILDREN))
